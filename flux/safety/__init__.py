"""Content filters, watermarks, signatures, and what an image says about its origin."""
