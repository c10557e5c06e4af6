"""What a compressed model looks like on disk, and how `from_pretrained` builds it again."""
