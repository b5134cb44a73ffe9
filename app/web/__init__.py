"""What the page serves over HTTP."""
