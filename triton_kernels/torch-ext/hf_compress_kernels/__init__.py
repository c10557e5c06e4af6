"""Low-bit and block-sparse operators for compressed transformers."""
