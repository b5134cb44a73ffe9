"""Model files of one's own: found in folders, described by their headers, and combined to models that run."""
