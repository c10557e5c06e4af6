"""Generating text on a CPU with a compiled decoding step."""

from transformers import CompileConfig


def compiled_decoding() -> dict:
    """Options of `generate` that run decoding steps as one compiled graph over a static cache, on CPUs too.

        model.generate(**inputs, max_length=256, **compiled_decoding())

    The first call compiles, which needs a C++ compiler and takes some twenty seconds for 30 layers; so does a call of
    another batch size or another `max_length`, which is the cache's (with `max_new_tokens`, the prompt's length counts
    as well). The tokens are those of plain `generate`, but for rounding.
    """
    config = CompileConfig(fullgraph=True, mode="default", dynamic=False)
    config._compile_all_devices = True  # Transformers compiles on its own on GPUs only
    return {"cache_implementation": "static", "compile_config": config}
