"""The tasks that recipes and the command line train and measure: what each reads, and how rows become tokens."""
