"""Views: HTML from data."""
