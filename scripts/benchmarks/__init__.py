"""The measurements of `scripts/bench.py`: each is a short function that gives rows of its table."""
