"""What scripts/train.py is asked for, and the log that it keeps; the training itself is there, and in flux/training.py."""
