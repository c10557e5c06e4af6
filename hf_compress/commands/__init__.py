"""What `hf-compress <verb>` runs."""
