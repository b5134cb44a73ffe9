"""Read images, write mp4 files."""
