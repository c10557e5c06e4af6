"""What files for other runtimes are made of."""
