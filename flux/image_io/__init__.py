"""Images in and out: files, sizes, masks, control maps, metadata."""
