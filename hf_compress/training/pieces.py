"""What training adds to a model and `finish` takes away again: pieces of the whole model, forms of single weights.

Methods say here what they are, so that `finish` and the trainers need not know them. Neither changes what a checkpoint
of the model holds: that is the plain model.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from hf_compress.model.unfinished import PIECES, pieces_of
from hf_compress.surgery.transaction import Transaction


class Form(Protocol):
    """How training computes with the weight of one module, fake-quantized say, and how the module is stored then.

    column_unit   so many neighbouring columns of the weight can only be cut together
    hears_all     whether an input counts although its column is zero: in the largest value of a token, say
    is_idle       whether no input has come in training of which something should be known; None if nothing should
    """

    column_unit: int
    hears_all: bool
    is_idle: bool | None

    def check(self, name: str) -> None:
        """Raise ValueError, with the module's name, for what cannot be stored yet."""

    def select(self, transaction: Transaction, rows: Sequence[int] | None, columns: Sequence[int] | None) -> None:
        """Keep what belongs to these rows and columns of the weight, later: by `transaction.set`."""

    def take_off(self, module: nn.Module) -> None:
        """Changes `module`: it computes with its plain weight again."""

    def put_on(self, module: nn.Module) -> None:
        """Changes `module`: undoes `take_off`."""

    def stored(self, module: nn.Module) -> nn.Module:
        """What takes the place of `module`, which is plain, perhaps cut, and computes the same.

        The weight is the module's own, or what `shards.whole` gathers, on all ranks.
        """


class Piece:
    """What a method does to a whole model: masks, gates, layers that will go.

    name           under which a model has one of it
    cuts_silent    whether heads and neurons that fell silent are cut
    units          "heads", "neurons" -> so many neighbouring columns of an output projection go together
    block_size     side of the blocks of which empty ones are not stored; None for weights that stay dense
    """

    name = ""
    cuts_silent = False
    units: Mapping[str, int] = {}
    block_size: int | None = None

    def check(self, model: PreTrainedModel, pieces: "Sequence[Piece]") -> None:
        """Raise ValueError for what could not be finished, before the first step. `pieces` are all of the model's."""

    def is_done(self, step: int) -> bool:
        """Whether, after `step` optimizer steps, this piece has reached what was asked for."""
        return True

    def settle(self) -> None:
        """Changes the model: what hooks add to it goes into its weights."""

    def cut(self, model: PreTrainedModel) -> None:
        """Changes the model, which is stored but for this: takes out what only this piece knows to be silent."""

    def close(self) -> None:
        """Remove all hooks."""

    def removed_layers(self, model: PreTrainedModel) -> set[int]:
        """The layers that go, numbered as in `anatomy(model).layers`; in eval mode they are passed over already."""
        return set()


def check_pieces(model: nn.Module, pieces: Iterable[Piece]) -> None:
    """Raise ValueError, before the first step, where one of the pieces could not be finished beside the others."""
    pieces = list(pieces)
    for piece in pieces:
        piece.check(model, pieces)


def join(model: nn.Module, piece: Piece) -> None:
    """Changes `model`: `piece` is one of its pieces now, in the place of one of the same name. Checks all of them."""
    pieces = [other for other in pieces_of(model) if other.name != piece.name]
    check_pieces(model, [*pieces, piece])
    for other in pieces_of(model):
        if other.name == piece.name and other is not piece:
            other.close()
    setattr(model, PIECES, [*pieces, piece])
