"""The job queue: jobs survive a closed page and a restart."""
