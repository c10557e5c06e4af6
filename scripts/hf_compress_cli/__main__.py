"""`python -m hf_compress_cli`."""

from hf_compress_cli import entry_point

entry_point()
