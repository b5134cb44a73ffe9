"""The page's HTTP: its API, media files and limits."""
