"""What is in memory when, and how fast: plans, lazy loading, streaming, faster forwards."""
