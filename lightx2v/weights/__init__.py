"""Model files: found, checked, read tensor by tensor, and placed in a module."""
