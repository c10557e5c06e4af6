"""Makes a student out of a teacher: fewer layers, narrower, every weight copied."""

import copy
import logging
from collections.abc import Collection, Container, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.distillation.layer_map import number_of, uniform
from hf_compress.distillation.slices import Axes, hidden_norms, largest, layer_slices
from hf_compress.distillation.student_config import check_shape, student_config
from hf_compress.model.anatomy import Anatomy, anatomy
from hf_compress.model.unfinished import check_finished, check_loaded
from hf_compress.model.weights import as_matrix, float_weights, without_foreign_quantization
from hf_compress.surgery.position_bias import KEPT

logger = logging.getLogger(__name__)


def make_student(
    teacher: PreTrainedModel,
    *,
    num_hidden_layers: int | str | None = None,
    layers: str | Sequence[int] = "skip",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    weights: str = "copy",
) -> PreTrainedModel:
    """A new, smaller model of the teacher's class and task; the teacher is left as it is.

    Args:
        num_hidden_layers: layers of the student, in each of encoder and decoder, or their share of the teacher's, such
            as "1/3"; the teacher's number by default.
        layers: which teacher layers it starts from: `first`, `last`, `skip` (evenly spaced, the last one included), or
            their numbers, from 0.
        hidden_size, intermediate_size, num_attention_heads: widths, where they differ from the teacher's.
        weights: `copy` takes from the teacher all weights, and in narrower matrices the rows and columns with the
            largest norm; `fresh` initialises the matrices whose shape differs as the model class does, and logs their
            names.

    The weights of a packed, block-sparse or factorised teacher are those that it computes with; the student's are
    ordinary. Raises ValueError for layers that are not there, for widths that do not fit together or that the family
    cannot have, and with `copy` for weights that the teacher has none for; TypeError for a teacher with adapters. What
    the teacher was made without (the pooler of a BERT inside a masked language model) is drawn anew, and logged.
    """
    if weights not in ("copy", "fresh"):
        raise ValueError(f"weights must be `copy` or `fresh`, got {weights!r}.")
    if not isinstance(teacher, PreTrainedModel) or getattr(teacher, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"A student is made of a Transformers model, got {type(teacher).__name__} with adapters or parts of its "
            "own. Merge adapters first: model.merge_and_unload()."
        )
    check_loaded(teacher, "make_student")
    check_finished(teacher, "make_student")
    source = anatomy(teacher)
    if cut := [a.name for layer in source.layers for a in layer.attentions if hasattr(a.module, KEPT)]:
        raise ValueError(
            f"{', '.join(cut[:3])} of the teacher lost heads whose position bias other layers share, which an ordinary "
            "student cannot say. Make the student of the whole model, and prune it then."
        )
    kept = [_kept_layers(stack.name, len(stack.layers), num_hidden_layers, layers) for stack in source.stacks]
    config = student_config(teacher.config, source, kept, hidden_size=hidden_size, intermediate_size=intermediate_size,
                            num_attention_heads=num_attention_heads)  # fmt: skip
    student = type(teacher)(config)
    check_shape(student, [len(numbers) for numbers in kept], hidden_size=hidden_size or source.hidden_size,
                intermediate_size=intermediate_size, num_heads=num_attention_heads)  # fmt: skip
    plain = without_foreign_quantization(teacher)
    student.to(device=plain.device, dtype=plain.dtype)
    fresh = _copy_weights(plain, student, kept, slices=weights == "copy")
    absent = [name for name in fresh if _is_absent(plain, name)]
    if len(fresh) > len(absent) and weights == "copy":
        fresh = [name for name in fresh if name not in absent]
        raise ValueError(
            f"The teacher has nothing of the shape asked for to copy into {_listed(fresh)}. Ask for no more than each "
            "of its layers has (no more neurons or heads, and none larger), or set weights='fresh' to draw these anew."
        )
    if fresh:
        logger.warning("The student starts from the teacher but for %s, which are drawn anew.", _listed(fresh))
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def _is_absent(teacher: nn.Module, name: str) -> bool:
    """Whether the teacher was made without the part that holds this tensor, such as the pooler inside a BERT's MLM."""
    module = teacher
    for part in name.split(".")[:-1]:
        module = getattr(module, part, None)
        if module is None:
            return True
    return False


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _kept_layers(stack: str, depth: int, asked: int | str | None, layers: str | Sequence[int]) -> list[int]:
    number = None if asked is None else number_of(str(asked), depth)
    if not isinstance(layers, str):
        kept = list(layers)
        if not kept or any(not 0 <= i < depth for i in kept) or number not in (None, len(kept)):
            raise ValueError(
                f"layers={kept} must name {number or 'one or more'} of the teacher's layers, 0 to {depth - 1} in "
                f"{stack}."
            )
        return kept
    number = depth if number is None else number
    if not 1 <= number <= depth:
        raise ValueError(
            f"num_hidden_layers must lie between 1 and the teacher's {depth}, got {number}: {stack} has no more."
        )
    choices = {
        "first": list(range(number)),
        "last": list(range(depth - number, depth)),
        "skip": [i - 1 for i in uniform(number, depth)],
    }
    if layers not in choices:
        raise ValueError(f"layers must be one of {sorted(choices)} or a list of numbers, got {layers!r}.")
    return choices[layers]


@torch.no_grad()
def _copy_weights(teacher: nn.Module, student: nn.Module, kept: list[list[int]], *, slices: bool) -> list[str]:
    """Fill the student's tensors from the teacher's; returns the names of those that keep their initial values.

    Raises ValueError if the student would lack a part of the teacher that lies outside the layers.
    """
    source, target = anatomy(teacher), anatomy(student)
    tensors = float_weights(teacher)
    hidden = largest(hidden_norms(tensors.values(), source.hidden_size), target.hidden_size)
    chosen: dict[str, Axes] = layer_slices(teacher, source, target, kept) if slices else {}
    saved = student.state_dict()  # buffers that are not saved follow from the config
    _check_complete(source, saved.keys(), teacher.state_dict().keys() & tensors.keys())
    names, fresh = _sources(source, target, kept, saved, tensors), []
    constant = {name for name, p in student.named_parameters() if not p.requires_grad}  # sines
    for name, tensor in saved.items():
        module = student.get_submodule(name.rpartition(".")[0])
        tensor, old = as_matrix(module, tensor), tensors.get(names[name])
        if old is not None and old.shape != tensor.shape and slices:
            old = _cut(old, chosen.get(names[name], ()), hidden, source.hidden_size, tensor.shape)
        if old is not None and old.shape == tensor.shape and old.is_floating_point() == tensor.is_floating_point():
            tensor.copy_(old)
        elif name not in constant:
            fresh.append(name)
    student.tie_weights()
    return fresh


def _sources(
    source: Anatomy, target: Anatomy, kept: list[list[int]], names: Iterable[str], tensors: Container[str]
) -> dict[str, str]:
    """Student's tensor -> the teacher's. What only one layer of a stack has (T5's position bias) is that layer's."""
    found = {name: name for name in names}
    for old, new, numbers in zip(source.stacks, target.stacks, kept, strict=True):
        for i, number in enumerate(numbers):
            prefix = f"{new.name}.{i}."
            for name in [n for n in names if n.startswith(prefix)]:
                rest = name.removeprefix(prefix)
                candidates = [f"{old.name}.{layer}.{rest}" for layer in (number, *range(len(old.layers)))]
                found[name] = next((c for c in candidates if c in tensors), candidates[0])
    return found


def _check_complete(source: Anatomy, mine: Collection[str], theirs: Iterable[str]) -> None:
    """Raise ValueError if the student lacks a part of the teacher: a projection between widths that are now equal."""
    layers = tuple(f"{stack.name}." for stack in source.stacks)
    if lost := sorted(name for name in theirs if not name.startswith(layers) and name not in mine):
        raise ValueError(
            f"A student of this shape has no {_listed(lost)}, which the teacher has: its config builds them for other "
            "widths only. Choose another hidden_size."
        )


def _cut(old: Tensor, chosen: Axes, hidden: Tensor, hidden_size: int, shape: torch.Size) -> Tensor | None:
    """The slice of `old` that has the student's shape, or None where there is none."""
    if old.dim() != len(shape):
        return None
    for axis, size in enumerate(shape):
        index = chosen[axis] if axis < len(chosen) else None
        if index is None and old.shape[axis] == size:
            continue
        if index is None and old.shape[axis] == hidden_size and size == len(hidden):
            index = hidden
        if index is None or len(index) != size:
            return None
        old = old.index_select(axis, index.to(old.device))
    return old
