"""What to remove, when, and by how much: importances, schedules, masks, callbacks and trainers."""
