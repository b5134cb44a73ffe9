"""A loaded engine, and one run on it."""
