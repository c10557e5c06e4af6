"""Fast products of the compressed layers on CPUs, over what comes with PyTorch: oneDNN and ATen's low-bit kernels.

The rule, which `routes.choose` follows from what the processor can do:

    8 bit with one scale a row, where products of 8-bit integers are exact (VNNI): integers, each token rounded
    a model that decodes: ATen's low-bit kernel for few tokens, the weight dequantized in each call for many
    all else: the dense weight, kept, in bfloat16 where that is fast (AMX, AMD), else in float32

The layers' stored tensors stay the only state. HF_COMPRESS_CPU chooses, when a model is loaded or quantized: `auto`,
the rule; `exact`, float32 arithmetic on the dequantized weight, kept; `reference`, the weight dequantized in each call.
"""
