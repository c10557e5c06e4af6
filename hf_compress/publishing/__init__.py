"""To the Hub, with a measured card."""
