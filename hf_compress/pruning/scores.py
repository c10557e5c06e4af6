"""What decides which block goes: one small class for each kind of score. The lowest scores go first.

A score that is gathered while training runs keeps it in one tensor for each matrix, a buffer of the training state, so
it survives resume. It is the same on all ranks: gradients of weights are, and what hooks see is summed over the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy, in_features
from hf_compress.model.calibration import text_mask, token_rows
from hf_compress.model.calibration_data import IGNORED
from hf_compress.pruning.importance.tokens import by_example
from hf_compress.pruning.masks import Blocks
from hf_compress.training.callback import WhileTraining, is_recomputing
from hf_compress.training.shards import as_part, own, part


class Score:
    """Base: a score told from the weights alone."""

    is_gathered = False  # while training runs; it then knows nothing before the first step
    forgets = False  # starts anew after each update of the masks

    def buffer(self, matrix: Blocks) -> Tensor | None:
        """Where to gather, zeros."""
        return None

    def open(self, model: nn.Module, matrices: Sequence[Blocks]) -> list[Any]:
        """Register hooks; returns their handles."""
        return []

    def gather(self, number: int, matrix: Blocks, buffer: Tensor) -> None:
        """Add what one optimizer step says, after its backward passes and before the step."""

    def scores(self, number: int, matrix: Blocks, buffer: Tensor | None) -> Tensor:
        """Matrix `number`'s scores (N / r, K / c)."""
        raise NotImplementedError


class Magnitude(Score):
    """The largest absolute weight of a block (Narang et al. 2017), or its L2 norm."""

    def __init__(self, reduce: str = "max"):
        self.reduce = reduce

    def scores(self, number, matrix, buffer):
        weight = matrix.weight
        return matrix.largest(weight.abs()) if self.reduce == "max" else matrix.sum(weight.float() ** 2).sqrt()


class Movement(Score):
    """The sum over steps of -w * dL/dw: high for weights that move away from zero.

    Sanh et al. 2020, https://arxiv.org/abs/2005.07683, eq. 4; of a block the sum. A weight held at zero moves no more.
    """

    is_gathered = True

    def buffer(self, matrix):
        return torch.zeros(matrix.grid)

    def gather(self, number, matrix, buffer):
        if matrix.gradient is not None:
            buffer -= matrix.sum(matrix.weight.float() * matrix.gradient.float())

    def scores(self, number, matrix, buffer):
        return buffer


class Taylor(Score):
    """The sum over steps of (w . dL/dw)^2, w being a block: what the loss would change, to first order, without it.

    Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, eq. 8, by optimizer steps. A block held at zero scores 0.
    """

    is_gathered = True
    forgets = True

    def buffer(self, matrix):
        return torch.zeros(matrix.grid)

    def gather(self, number, matrix, buffer):
        if matrix.gradient is not None:
            buffer += matrix.sum(matrix.weight.float() * matrix.gradient.float()) ** 2

    def scores(self, number, matrix, buffer):
        return buffer


class _FromInputs(Score):
    """Base: a score gathered from what goes into the matrices, by hooks that see training passes only."""

    is_gathered = True
    forgets = True

    def open(self, model, matrices):
        self.seen: list[Tensor | None] = [None] * len(matrices)  # by this rank since the last optimizer step
        self.masks: tuple[Tensor | None, Tensor | None] = (None, None)  # of the running pass: encoder's, decoder's
        self.shape: tuple[int, ...] | None = None  # of its text, (B, T)
        self.of_decoder = decoder_maps(model)
        self.passed: set[int] = set()  # seen in a forward pass since the last optimizer step

        def note_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
            labels = kwargs.get("labels")
            if labels is not None and labels.dim() == 2 and "decoder_attention_mask" not in kwargs:
                kwargs = {**kwargs, "decoder_input_ids": labels, "decoder_attention_mask": labels != IGNORED}
            self.masks = text_mask(kwargs), text_mask(kwargs, is_decoder=True)
            ids = kwargs.get("input_ids")
            self.shape = None if ids is None else ids.flatten(0, -2).shape

        def note_input(number: int):
            def hook(module: nn.Module, args: tuple) -> None:
                if not (model.training and torch.is_grad_enabled()):
                    return
                if is_recomputing() and number in self.passed:
                    return  # reentrant checkpointing has no graph in the forward pass, other kinds do
                if not is_recomputing():
                    self.passed.add(number)
                self.see(number, matrices[number], args[0])

            return hook

        handles = [m.module.register_forward_pre_hook(WhileTraining(note_input(i))) for i, m in enumerate(matrices)]
        return [model.register_forward_pre_hook(WhileTraining(note_mask), with_kwargs=True), *handles]

    def see(self, number: int, matrix: Blocks, x: Tensor) -> None:
        raise NotImplementedError

    def add(self, number: int, value: Tensor) -> None:
        seen = self.seen[number]
        self.seen[number] = value if seen is None else seen + value

    def gather(self, number, matrix, buffer):
        value, self.seen[number] = self.seen[number], None
        self.passed.discard(number)
        if dist.is_initialized():  # every rank takes part, also one whose batch never reached this matrix
            value = torch.zeros_like(buffer) if value is None else value
            dist.all_reduce(value)
        if value is not None:
            buffer += value


class GateGradient(_FromInputs):
    """For heads and neurons: the sum over examples of |d loss / d gate|, the gate being a factor on a column block.

    Michel et al. 2019, https://arxiv.org/abs/1905.10650, eq. 2; Prasanna et al. 2020, https://arxiv.org/abs/2005.00561.
    The gradient with respect to a gate at 1 is sum x * dL/dx, for each example by itself. `normalize` divides by each
    matrix's L2 norm.
    """

    def __init__(self, normalize: bool):
        self.normalize = normalize

    def buffer(self, matrix):
        return torch.zeros(matrix.grid[1])

    def see(self, number, matrix, x):
        if not x.requires_grad:
            return
        values = by_example(x.detach(), self.shape)  # a hook that held x itself would keep it, and its graph, forever

        def note_gradient(gradient: Tensor) -> None:
            if values.dim() != 3:
                raise ValueError(
                    f"{matrix.name} works on {tuple(values.shape)}: importance by gradient is summed for each example "
                    "and needs (examples, tokens, width). Batches without padding have no examples to tell apart."
                )
            gates = (
                (values * gradient.view_as(values)).float().sum(dim=1).unflatten(-1, (-1, matrix.shape[1])).sum(-1)
            )  # (B, H)
            self.add(number, gates.abs().sum(dim=0))

        x.register_hook(note_gradient)

    def scores(self, number, matrix, buffer):
        norm = buffer.norm().clamp(min=torch.finfo(buffer.dtype).tiny) if self.normalize else 1
        return (buffer / norm)[None]


def decoder_maps(model: nn.Module) -> set[nn.Module]:
    """Of an encoder-decoder: what sees the decoder's tokens, so without cross-attention's keys and values."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    layers = anatomy(model).stacks[-1].layers
    over = {m for layer in layers for a in layer.attentions if a.is_cross for m in (a.key, a.value)}
    return {module for layer in layers for module in layer.module.modules()} - over


class Wanda(_FromInputs):
    """|w| times the norm of its input over real tokens. Sun et al. 2023, https://arxiv.org/abs/2306.11695, eq. 1."""

    def buffer(self, matrix):
        return torch.zeros(in_features(matrix.module))

    def see(self, number, matrix, x):
        mask = self.masks[matrix.module in self.of_decoder]
        self.add(number, (token_rows(x.detach(), mask).float() ** 2).sum(dim=0))

    def scores(self, number, matrix, buffer):
        weight = matrix.weight
        return matrix.sum(as_part(own(weight).abs().float() * buffer.sqrt()[part(weight, 1)], weight))


class Given(Score):
    """Scores known beforehand, one row of a tensor (L, H) for each matrix; nan where a layer has fewer."""

    def __init__(self, importance: Tensor):
        self.importance = importance

    def scores(self, number, matrix, buffer):
        row = self.importance[number]
        return row[~row.isnan()][None].to(matrix.weight.device)


class Random(Score):
    """A fixed random order: what the others should be better than."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def scores(self, number, matrix, buffer):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
        return torch.rand(matrix.grid, generator=generator).to(matrix.weight.device)
