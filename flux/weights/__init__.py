"""Weight files: found, checked, and mapped into modules; quantised formats."""
