"""The training of the embedded models, stage by stage. scripts/toy/train.py runs it."""
