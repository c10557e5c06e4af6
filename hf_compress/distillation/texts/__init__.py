"""More text to distil on: augmentation, and targets that the teacher writes."""
