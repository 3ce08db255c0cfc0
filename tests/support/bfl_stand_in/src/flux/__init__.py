"""A stand-in for BFL's package of this name."""
