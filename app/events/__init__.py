"""The page's events and what they do."""
