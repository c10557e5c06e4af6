"""Makes a student out of a teacher: fewer layers, narrower, weights copied wherever shapes allow."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.distillation.layer_map import uniform
from hf_compress.model.anatomy import Anatomy, Attention, FeedForward, anatomy, in_features, out_features

FEED_FORWARD_NAMES = ("intermediate_size", "hidden_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff")
HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def make_student(
    teacher: PreTrainedModel,
    *,
    num_hidden_layers: int | None = None,
    layers: str | Sequence[int] = "skip",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    weights: str = "copy",
) -> PreTrainedModel:
    """A new, smaller model of the teacher's class and task; the teacher is left as it is.

    Args:
        num_hidden_layers: layers of the student, in each of encoder and decoder; the teacher's number by default.
        layers: which teacher layers it starts from: `first`, `last`, `skip` (evenly spaced, the last one included), or
            their numbers, from 0.
        hidden_size, intermediate_size, num_attention_heads: widths, where they differ from the teacher's.
        weights: `copy` takes from the teacher all weights, and in narrower matrices the rows and columns with the
            largest norm; `fresh` initialises the matrices whose shape differs as the model class does.

    Raises ValueError for layers that are not there and for widths that do not fit together.
    """
    if weights not in ("copy", "fresh"):
        raise ValueError(f"weights must be `copy` or `fresh`, got {weights!r}.")
    source = anatomy(teacher)
    depths = [len(stack.layers) for stack in source.stacks]
    kept = [_kept_layers(depth, num_hidden_layers, layers) for depth in depths]
    config = _student_config(teacher.config, source, kept, hidden_size, intermediate_size, num_attention_heads)
    student = type(teacher)(config).to(device=teacher.device, dtype=teacher.dtype)
    _copy_weights(teacher, student, source, kept, slices=weights == "copy")
    student.tie_weights()
    return student.eval()


def _kept_layers(depth: int, number: int | None, layers: str | Sequence[int]) -> list[int]:
    if not isinstance(layers, str):
        kept = list(layers)
        if not kept or any(not 0 <= i < depth for i in kept) or number not in (None, len(kept)):
            raise ValueError(
                f"layers={kept} must name {number or 'one or more'} of the teacher's layers, 0 to {depth - 1}."
            )
        return kept
    number = depth if number is None else number
    if not 1 <= number <= depth:
        raise ValueError(f"num_hidden_layers must lie between 1 and the teacher's {depth}, got {number}.")
    choices = {
        "first": list(range(number)),
        "last": list(range(depth - number, depth)),
        "skip": [i - 1 for i in uniform(number, depth)],
    }
    if layers not in choices:
        raise ValueError(f"layers must be one of {sorted(choices)} or a list of numbers, got {layers!r}.")
    return choices[layers]


def _student_config(
    teacher_config: PreTrainedConfig,
    source: Anatomy,
    kept: list[list[int]],
    hidden_size: int | None,
    intermediate_size: int | None,
    num_heads: int | None,
) -> PreTrainedConfig:
    config = copy.deepcopy(teacher_config)
    config.__dict__.pop("quantization_config", None)  # of a compressed teacher; the student is an ordinary model
    _set(config, DEPTH_NAMES, len(kept[0]))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept[0]]
    attention = source.layers[0].attention
    old_width, old_heads, group = (
        source.hidden_size,
        attention.num_heads,
        attention.num_heads // attention.num_key_value_heads,
    )
    width, heads = hidden_size or old_width, num_heads or old_heads
    if width % heads:
        raise ValueError(
            f"num_attention_heads must divide hidden_size: got num_attention_heads={heads}, hidden_size={width}. "
            f"Choose for example hidden_size={width // heads * heads or heads}."
        )
    if heads % group:
        raise ValueError(
            f"num_attention_heads={heads} must be a multiple of {group}, the heads that share a key in the teacher."
        )
    if intermediate_size is not None:
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1, got {intermediate_size}.")
        _set(config, FEED_FORWARD_NAMES, intermediate_size)
    if (width, heads) != (old_width, old_heads):
        for name in ("embedding_size", "pooler_hidden_size", "classifier_hidden_size"):
            if getattr(config, name, None) == old_width:
                setattr(config, name, width)
        config.hidden_size = width
        _set(config, HEAD_NAMES, heads)
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = heads // group
        if getattr(config, "head_dim", None) == old_width // old_heads:
            config.head_dim = width // heads
    return config


def _set(config: PreTrainedConfig, names: Sequence[str], value: int) -> None:
    aliases = getattr(config, "attribute_map", {})
    for name in names:
        if hasattr(config, name) and name not in aliases:
            setattr(config, name, value)


@torch.no_grad()
def _copy_weights(teacher: nn.Module, student: nn.Module, source: Anatomy, kept: list[list[int]], slices: bool) -> None:
    target = anatomy(student)
    hidden = _largest(_hidden_norms(teacher, source.hidden_size), target.hidden_size)
    chosen: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}  # teacher's weight -> rows (out), columns (in)
    renamed = {}
    for old_stack, new_stack, numbers in zip(source.stacks, target.stacks, kept, strict=True):
        for new, number in enumerate(numbers):
            renamed[f"{new_stack.name}.{new}."] = f"{old_stack.name}.{number}."
            old_layer, new_layer = old_stack.layers[number], new_stack.layers[new]
            for mine, theirs in zip(new_layer.attentions, old_layer.attentions, strict=True):
                chosen.update(_attention_rows(mine, theirs))
            chosen.update(_feed_forward_rows(new_layer.feed_forward, old_layer.feed_forward))
    tensors = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    saved = student.state_dict()  # buffers that are not saved follow from the config
    for name, tensor in saved.items():
        prefix = next((p for p in renamed if name.startswith(p)), "")
        old = tensors.get(renamed.get(prefix, "") + name.removeprefix(prefix))
        if old is None:
            continue
        if old.shape != tensor.shape and slices:
            old = _cut(old, chosen.get(old, (None, None)), hidden, source.hidden_size, tensor.shape)
        if old is not None and old.shape == tensor.shape:
            tensor.copy_(old)


def _cut(old: Tensor, rows: tuple, hidden: Tensor, hidden_size: int, shape: torch.Size) -> Tensor | None:
    """The slice of `old` that has the student's shape, or None where there is none."""
    if old.dim() != len(shape):
        return None
    for axis, size in enumerate(shape):
        index = rows[axis] if axis < len(rows) and rows[axis] is not None else None
        if old.shape[axis] == size and index is None:
            continue
        if index is None and old.shape[axis] == hidden_size and size == len(hidden):
            index = hidden
        if index is None or len(index) != size:
            return None
        old = old.index_select(axis, index.to(old.device))
    return old


def _largest(norms: Tensor, number: int) -> Tensor:
    """Indices of the `number` largest, ascending; fewer when there are not as many."""
    return norms.topk(min(number, len(norms))).indices.sort().values


def _hidden_norms(model: nn.Module, hidden_size: int) -> Tensor:
    """How much weight lies on each hidden dimension, (D,): the squared norm of all matrices' rows or columns for it."""
    norms = torch.zeros(hidden_size)
    for weight in model.parameters():
        if weight.dim() == 2:
            for axis in (0, 1):
                if weight.shape[axis] == hidden_size:
                    norms += weight.float().square().sum(dim=1 - axis).cpu()
    return norms


def _by_rows(module: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).float().cpu()


def _placed(module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> dict:
    pairs = {module.weight: (columns, rows) if isinstance(module, Conv1D) else (rows, columns)}
    if module.bias is not None and rows is not None:
        pairs[module.bias] = (rows,)
    return pairs


def _attention_rows(mine: Attention, theirs: Attention) -> dict:
    """Which heads, and which dimensions within each head, the student takes."""
    Dh, new_Dh = theirs.head_dim, mine.head_dim
    group = theirs.num_heads // theirs.num_key_value_heads
    columns = _by_rows(theirs.output).square().sum(dim=0).view(theirs.num_key_value_heads, group, Dh)
    groups = _largest(columns.sum(dim=(1, 2)), mine.num_key_value_heads)
    if len(groups) < mine.num_key_value_heads or new_Dh > Dh:
        return {}  # more than the teacher has: initialised afresh
    heads = (groups[:, None] * group + torch.arange(group)).flatten()
    within = torch.arange(Dh)
    if new_Dh < Dh:  # the same dimensions in every head; halves together, as rotary embeddings pair them
        halves = columns.sum(dim=(0, 1)).view(2, -1).sum(dim=0) if Dh % 2 == new_Dh % 2 == 0 else None
        within = (
            _largest(columns.sum(dim=(0, 1)), new_Dh)
            if halves is None
            else torch.cat([first := _largest(halves, new_Dh // 2), first + Dh // 2])
        )
    query = (heads[:, None] * Dh + within).flatten()
    key = (groups[:, None] * Dh + within).flatten()
    if theirs.is_fused:
        sizes = out_features(theirs.query) - 2 * theirs.num_key_value_heads * Dh
        rows = torch.cat([query, sizes + key, sizes + theirs.num_key_value_heads * Dh + key])
        placed = _placed(theirs.query, rows)
    else:
        placed = {**_placed(theirs.query, query), **_placed(theirs.key, key), **_placed(theirs.value, key)}
    for module in theirs.positional:
        placed.update(_placed(module, query))
    return {**placed, **_placed(theirs.output, columns=query)}


def _feed_forward_rows(mine: FeedForward, theirs: FeedForward) -> dict:
    neurons = _largest(_by_rows(theirs.output).square().sum(dim=0), in_features(mine.output))
    rows = torch.cat([neurons, neurons + theirs.num_neurons]) if theirs.is_fused else neurons
    placed = _placed(theirs.output, columns=neurons)
    for module in theirs.inputs:
        placed.update(_placed(module, rows))
    return placed
