"""Content filters, and what an image says about its origin."""
