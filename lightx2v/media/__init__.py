"""Images in, mp4 files out."""
