"""Where a teacher comes from: alive, cached on disk, several at once, sharded, with adapters."""
