"""What the scripts share. The modules here cannot be run."""
