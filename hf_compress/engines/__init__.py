"""Fast products of the compressed layers on CPUs, over what comes with PyTorch: oneDNN and ATen's low-bit kernels.

The rule, which `routes.choose` follows from what the processor can do:

    8 bit with one scale a row, where products of 8-bit integers are exact (VNNI): integers, each token rounded
    a model that decodes: ATen's low-bit kernel for few tokens, the weight dequantized in each call for many
    all else: the dense weight, kept, in bfloat16 where that is fast (AVX512_BF16, AMX), else in float32

The layers' stored tensors stay the only state: a route is made when it is first needed, never saved, and made again
after loading, moving or casting. The environment variable HF_COMPRESS_CPU chooses, when a model is loaded or quantized:

    auto       (default) the rule above
    exact      float32 arithmetic, the dequantized weight kept in memory; activations rounded only if the record says so
    reference  no route: the weight is dequantized in each call
"""
