"""Which teacher layer each student layer follows.

A layer map is a list: `layer_map[i]` is the teacher's hidden state that student layer i + 1 follows, numbered as in
`hidden_states` (0 is the embedding, 1 the output of the first layer).
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from torch import nn

from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import plain_model


def uniform(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """TinyBERT's g(m) = m * L / M: evenly spaced, the last one on the last."""
    return [max(1, (m * num_teacher_layers) // num_student_layers) for m in range(1, num_student_layers + 1)]


def last(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """The last teacher layers, one each."""
    return [num_teacher_layers - num_student_layers + m for m in range(1, num_student_layers + 1)]


NAMED = {"uniform": uniform, "skip": uniform, "last": last}  # `skip` is what `make_student` calls it

SHARE = re.compile(r"\d+/0*[1-9]\d*|\d*\.\d+")  # that `Fraction` reads, and divides by nothing


def num_layers(model: nn.Module) -> int:
    return len(anatomy(model).layers)


def num_hidden_states(model: nn.Module) -> int:
    """Each stack has one more than layers: its embedding. The decoder's are counted on after the encoder's."""
    return sum(len(stack.layers) + 1 for stack in anatomy(model).stacks)


def first_decoder_state(model: nn.Module) -> float:
    """The number of the decoder's first hidden state in an encoder-decoder; infinity for a model of one stack."""
    stacks = anatomy(plain_model(model)).stacks
    return len(stacks[0].layers) + 1 if len(stacks) > 1 else math.inf


def check_one_stack(student: nn.Module, teacher: nn.Module, method: str) -> None:
    """Raise ValueError for an encoder-decoder, whose layers `method` cannot map."""
    for model in (student, teacher):
        if len(anatomy(model).stacks) > 1:
            raise ValueError(
                f"{method} maps the layers of one stack, but {type(plain_model(model)).__name__} has an encoder and a "
                "decoder. Use DistillationTrainer, with hints for inner layers."
            )


def make_layer_map(layers: str, student: nn.Module, teacher: nn.Module, *, without_last: bool = False) -> list[int]:
    """Read `layers`: a name of `NAMED` or numbers such as `2,4,6`. Raises ValueError for a map that points nowhere.

    `without_last` leaves the student's last layer out of the map, as PKD does.
    """
    num_student, num_teacher = num_layers(student), num_layers(teacher)
    if layers in NAMED:
        if num_student > num_teacher:
            raise ValueError(
                f"The layer map `{layers}` needs a student no deeper than its teacher: it has {num_student} layers, "
                f"the teacher {num_teacher}. Name the teacher's layers one by one, as in `1,1,2,2`."
            )
        return NAMED[layers](num_student, num_teacher)[: num_student - without_last]
    try:
        layer_map = [int(number) for number in layers.split(",")]
    except ValueError:
        raise ValueError(f"A layer map is one of {sorted(NAMED)} or numbers such as `2,4,6`, got {layers!r}.") from None
    if len(layer_map) != num_student - without_last:
        but_the_last = f" but the last: {num_student - 1} numbers" if without_last else ""
        raise ValueError(
            f"The layer map {layer_map} names {len(layer_map)} teacher layers, but the student has {num_student} "
            f"layers: name one for each{but_the_last}."
        )
    check_range(layer_map, num_teacher, "layer map", "teacher")
    return layer_map


def number_of(text: str, depth: int) -> int:
    """A number of layers, or of one counted from 1: as it is, `last`, or a share of the depth such as 1/3 or 0.5.

    A share is rounded, to at least 1. Raises ValueError for another word, and for a share outside of 0 to 1.
    """
    text = text.strip()
    if text == "last":
        return depth
    if text.lstrip("-").isdecimal():
        return int(text)
    share = Fraction(text) if SHARE.fullmatch(text) else 0
    if not 0 < share <= 1:
        raise ValueError(
            f"Layers are a number, or a share above 0 and up to 1, such as 1/3 or 0.5, or `last`; got {text!r}."
        )
    return max(1, round(share * depth))


def parse_pairs(pairs: str, student: nn.Module, teacher: nn.Module, *, option: str = "hints") -> list[tuple[int, int]]:
    """Read pairs of hidden states student:teacher. Raises ValueError for one that is not there.

    pairs   numbers `1:2,3:6`, shares of each model's depth `1/3:1/3,last:last`, or a name of `NAMED` for every layer of
            the student; two shares that come to the same layers are one pair
    option  what an error calls them
    """
    if not re.fullmatch(r"[\d:,\s]+", pairs):  # what is said of a depth is said of one stack
        check_one_stack(student, teacher, f"{option}={pairs!r}")
    if pairs in NAMED:
        return list(enumerate(make_layer_map(pairs, student, teacher), 1))
    depths = num_layers(student), num_layers(teacher)
    try:
        words = [pair.split(":") for pair in pairs.split(",")]
        parsed = [(number_of(mine, depths[0]), number_of(theirs, depths[1])) for mine, theirs in words]
    except ValueError:
        raise ValueError(
            f"{option} are pairs student:teacher of hidden states, as in `1:2,3:6`, shares of the depth, as in "
            f"`1/2:1/2,last:last`, or one of {sorted(NAMED)}, got {pairs!r}."
        ) from None
    check_range([mine for mine, _ in parsed], num_hidden_states(student) - 1, option, "student")
    check_range([theirs for _, theirs in parsed], num_hidden_states(teacher) - 1, option, "teacher")
    return list(dict.fromkeys(parsed))


def check_range(numbers: Sequence[int], last: int, what: str, who: str) -> None:
    """Raise ValueError for a number of a hidden state that is not between 0 and `last`."""
    if outside := [n for n in numbers if not 0 <= n <= last]:
        raise ValueError(
            f"The {what} points to hidden state {outside[0]} of the {who}, which has 0 (the embedding) to {last}."
        )
