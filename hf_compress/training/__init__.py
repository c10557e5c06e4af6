"""What every trainer of ours does: state that lives for training only, resuming, ranks, finite numbers."""
