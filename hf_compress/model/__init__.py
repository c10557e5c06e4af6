"""What a model is: its parts by structure, what flows through it, what it takes, and the record of its changes."""
