"""The format of llm-compressor and vLLM, read and written."""
