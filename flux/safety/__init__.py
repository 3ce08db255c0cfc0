"""Content filters, watermarks, and what an image says about its origin."""
