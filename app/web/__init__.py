"""The page's HTTP: its API, media files, uploads and limits."""
