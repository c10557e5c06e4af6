"""How fast a model writes: one token after another, each read again by the next."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_compress.model.reading import num_positions
from hf_compress.model.tasks import auto_class_name

DECODED = 16  # tokens that are written each time
WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def prompt_of(model: PreTrainedModel, single: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What a model goes on from: one example, cut so that what it writes has a position. None for one that does not."""
    is_both = getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "lm_head")  # BART fills in as well
    if not (auto_class_name(model) in WRITERS or is_both) or not model.can_generate() or "input_ids" not in single:
        return None
    most = num_positions(model)
    length = single["input_ids"].shape[1] if most is None else min(single["input_ids"].shape[1], most - DECODED)
    names = ("input_ids", "attention_mask")
    return {name: single[name][:, :length] for name in names if name in single} if length > 0 else None


def write(model: PreTrainedModel, prompt: Mapping[str, Tensor]) -> Tensor:
    """`DECODED` tokens, the likeliest each time, with the cache that the model has."""
    own = model.generation_config
    start = {name: getattr(own, f"{name}_token_id") for name in ("bos", "eos", "decoder_start")}
    known = {f"{name}_token_id": value for name, value in start.items() if value is not None}
    config = GenerationConfig(
        max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False, num_beams=1, use_cache=True,
        pad_token_id=own.pad_token_id or 0, **known,
    )  # fmt: skip
    with torch.inference_mode():
        return model.generate(**prompt, generation_config=config)
