"""LoRA files: their layouts, the merge into a model, and the set that is merged now."""
