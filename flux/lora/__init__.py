"""LoRA files: their formats, the merge into a network, and the set that is merged now."""
