"""Fast paths of the compressed layers on CPUs, over what comes with PyTorch: oneDNN and ATen's low-bit kernels.

What runs is read from `table.json` (measured, by processor, bits, tokens and size). The layers' stored tensors stay the
only state: what an engine needs beside them is made when it is first used, kept in a weak dictionary, never saved, and
made again when a stored tensor changes. The environment variable HF_COMPRESS_CPU chooses, when a model is loaded or
quantized:

    auto       (default) the fastest engine; products in bfloat16, or of 8-bit integers where the table says so
    exact      float32 arithmetic, the dequantized weight kept in memory
    reference  no engine: the weight is dequantized in each call
"""
