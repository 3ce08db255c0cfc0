"""Fine-tuning: the loss, the trainer, the data set, LoRA, distillation, several processes."""
