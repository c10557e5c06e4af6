"""Soft prompts: prompt tuning and p-tuning put virtual tokens before the real ones, which no other model has.

What such a model gives for each token is longer by them, at the front; here they are taken out, so that positions of
student and teacher are those of the same real tokens.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy
from hf_compress.model.capture import AttentionSignals, Signals
from hf_compress.model.tasks import Task, plain_model


def prompt_length(model: nn.Module) -> int:
    """How many virtual tokens the model puts before the input; prefix tuning puts them into the cache instead."""
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        return 0
    return config.num_virtual_tokens


def changes_positions(model: nn.Module) -> bool:
    """Whether predictions are longer by the prompt; in an encoder-decoder only the encoder's states are."""
    is_encoder_decoder = getattr(getattr(plain_model(model), "config", None), "is_encoder_decoder", False)
    return prompt_length(model) > 0 and not is_encoder_decoder


def without_prompt(model: nn.Module, task: Task, outputs: Mapping, signals: Signals) -> Mapping:
    """The outputs of `model` at the real tokens. Changes `signals` alike."""
    if not (length := prompt_length(model)):
        return outputs
    stacks = anatomy(model).stacks
    first_of_decoder = len(stacks[0].layers) if len(stacks) > 1 else None
    for number, states in signals.hidden_states.items():
        if first_of_decoder is None or number <= first_of_decoder:
            signals.hidden_states[number] = states[:, length:]
    for number, attention in signals.attention.items():
        if first_of_decoder is None or number < first_of_decoder:
            signals.attention[number] = _real_part(attention, length)
    if not changes_positions(model) or task.kind == "sequence":
        return outputs
    return type(outputs)(**{k: v[:, length:] if k.endswith("logits") else v for k, v in outputs.items()})


def _real_part(attention: AttentionSignals, length: int) -> AttentionSignals:
    cut = {name: getattr(attention, name)[:, :, length:] for name in ("query", "key", "value")}
    for name in ("bias", "mask"):
        if (tensor := getattr(attention, name)) is not None:
            cut[name] = _square(tensor, length) if tensor.dim() == 4 else tensor[:, length:]
    return replace(attention, **cut)


def _square(tensor: Tensor, length: int) -> Tensor:
    """(..., T, S), or one row for all queries."""
    return tensor[..., length:] if tensor.shape[-2] == 1 else tensor[..., length:, length:]
