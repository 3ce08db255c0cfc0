"""What an image says about its origin, and whether that holds."""
