"""The config of a student: the teacher's, with other depths and widths, under the names that its family gives them."""

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig

from hf_compress.model.anatomy import Anatomy, Stack, anatomy
from hf_compress.surgery.depth import cache_depth, per_layer_changes

# Of models with one stack of layers, of encoders, of decoders. A family has some of them, or calls them by an alias.
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers"), ("encoder_layers",), (
    "decoder_layers", "num_decoder_layers")  # fmt: skip
NEURONS = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"), (
    "encoder_ffn_dim",), ("decoder_ffn_dim",)  # fmt: skip
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads"), ("encoder_attention_heads",), (
    "decoder_attention_heads",)  # fmt: skip
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads"), (), ()
AS_WIDE_AS_HIDDEN = ("embedding_size", "pooler_hidden_size", "classifier_hidden_size", "word_embed_proj_dim")


def student_config(
    teacher_config: PreTrainedConfig,
    source: Anatomy,
    kept: list[list[int]],
    *,
    hidden_size: int | None,
    intermediate_size: int | None,
    num_attention_heads: int | None,
) -> PreTrainedConfig:
    """A copy of the teacher's config, which says `source`, with the layers `kept` of each stack and these widths.

    Raises ValueError for widths that do not fit together.
    """
    if intermediate_size is not None and intermediate_size < 1:
        raise ValueError(f"intermediate_size must be at least 1, got {intermediate_size}.")
    config = copy.deepcopy(teacher_config)
    config.__dict__.pop("quantization_config", None)  # of a compressed teacher; the student is an ordinary model
    width = hidden_size or source.hidden_size
    for number, (stack, numbers) in enumerate(zip(source.stacks, kept, strict=True)):
        for field, value in () if number else per_layer_changes(config, len(stack.layers), numbers).items():
            setattr(config, field, value)
        _set(config, DEPTH, number, len(source.stacks), len(numbers))
        widths = {layer.feed_forward.num_neurons for layer in stack.layers}
        if intermediate_size is not None or (width != source.hidden_size and len(widths) == 1):
            _set(config, NEURONS, number, len(source.stacks), intermediate_size or min(widths))
        _set_heads(config, stack, number, source, width, num_attention_heads)
    for field, value in cache_depth(config, [len(numbers) for numbers in kept]).items():
        setattr(config, field, value)
    if width != source.hidden_size:
        for name in AS_WIDE_AS_HIDDEN:
            if getattr(config, name, None) == source.hidden_size:
                setattr(config, name, width)
        config.hidden_size = width
    if not source.layers[0].attentions:
        return config
    attention = source.layers[0].attention
    head_dim = width // max(num_attention_heads or attention.num_heads, 1)
    # a size of its own shrinks with the width, and stays where there are fewer heads; Falcon's follows by itself
    if getattr(config, "head_dim", head_dim) == attention.head_dim > head_dim:
        config.head_dim = head_dim
    return config


def _set_heads(
    config: PreTrainedConfig, stack: Stack, number: int, source: Anatomy, width: int, num_heads: int | None
) -> None:
    if not stack.layers[0].attentions and num_heads is None:
        return
    attention = stack.layers[0].attention
    old = attention.num_heads
    heads = num_heads or old
    if (width, heads) == (source.hidden_size, old):
        return
    if width % heads:
        raise ValueError(
            f"num_attention_heads must divide hidden_size: got num_attention_heads={heads}, hidden_size={width}. "
            f"Choose for example hidden_size={width // heads * heads or heads}."
        )
    group = old // max(attention.num_key_value_heads, 1)
    is_grouped = attention.num_key_value_heads > 1
    if is_grouped and heads % group:
        raise ValueError(
            f"num_attention_heads={heads} must be a multiple of {group}, the heads that share a key in the teacher."
        )
    _set(config, HEADS, number, len(source.stacks), heads)
    _set(config, KEY_VALUE_HEADS, number, len(source.stacks), heads // group if is_grouped else 1)


def _set(config: PreTrainedConfig, names: Sequence[Sequence[str]], number: int, num_stacks: int, value: int) -> None:
    """Set what the config calls a size of stack `number`; an alias sets the name it stands for."""
    single, encoder, decoder = names
    mine = (*single, *encoder, *decoder) if num_stacks == 1 else decoder if number else (*single, *encoder)
    for name in mine:
        if getattr(config, name, None) is not None or (name == "n_inner" and hasattr(config, name)):
            setattr(config, name, value)


def check_shape(
    student: nn.Module, depths: list[int], *, hidden_size: int, intermediate_size: int | None, num_heads: int | None
) -> None:
    """Raise ValueError if the student's class has built another shape of its config than what was asked for."""
    built = anatomy(student)
    found = {
        "num_hidden_layers": [len(stack.layers) for stack in built.stacks],
        "hidden_size": {built.hidden_size},
        "intermediate_size": {layer.feed_forward.num_neurons for layer in built.layers},
        "num_attention_heads": {attention.num_heads for layer in built.layers for attention in layer.attentions},
    }
    wanted = {
        "num_hidden_layers": depths,
        "hidden_size": {hidden_size},
        "intermediate_size": intermediate_size and {intermediate_size},
        "num_attention_heads": num_heads and {num_heads},
    }
    for option, value in wanted.items():
        if value is not None and found[option] != value:
            raise ValueError(
                f"{type(student).__name__} cannot be given {option}={_shown(value)}: its config builds "
                f"{_shown(found[option])} whatever it is told. Leave {option} out; hfc.prune_neurons, "
                "hfc.prune_heads and hfc.prune_layers cut what a config cannot say."
            )


def _shown(sizes: list[int] | set[int]) -> str:
    return " and ".join(map(str, dict.fromkeys(sizes)))
