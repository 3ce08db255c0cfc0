"""Very many images: a manifest of requests, worked off by any number of processes and machines."""
