"""What a run costs on this machine: memory and time, predicted without torch."""
