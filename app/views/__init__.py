"""What the page shows: HTML made from data."""
