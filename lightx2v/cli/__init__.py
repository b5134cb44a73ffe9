"""What the command lines share: flags, terminal output and signals."""
