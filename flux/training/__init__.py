"""Training: the loss, the trainer, data sets, LoRA, distillation, several processes, memory."""
