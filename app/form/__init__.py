"""The form: its fields and their values."""
