"""Command lines: flags, terminal output, signals and exit codes."""
