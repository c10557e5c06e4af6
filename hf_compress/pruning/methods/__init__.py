"""One pruning method a file: its mask and schedule as a callback, its configuration and trainer."""
