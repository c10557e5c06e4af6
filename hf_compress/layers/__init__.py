"""The layers of compressed models: packed, block-sparse, low-rank, with codebooks."""
