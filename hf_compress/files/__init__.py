"""Files that are whole or not there, names that stay in their folder, and outputs where only what is ours goes."""
