"""Neuron pruning: while a model trains, the feed-forward neurons that matter least fall silent, and are cut in the end.

Prasanna et al., 2020, https://arxiv.org/abs/2005.00561

    importance of a neuron = mean over examples of |d loss / d gate|

Penalties on the weights of whole neurons: Murray and Chiang, 2015, https://arxiv.org/abs/1508.05051
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy, module_names, out_features
from hf_compress.model.weights import as_matrix
from hf_compress.pruning.callback import Pruning, check_cuts, per_matrix_importance
from hf_compress.pruning.masks import Blocks, Source, check_prunable
from hf_compress.pruning.methods.heads import unit_score
from hf_compress.pruning.proximal import ROW_PENALTIES
from hf_compress.pruning.scores import Given
from hf_compress.pruning.trainer import PruningConfig, PruningTrainer
from hf_compress.surgery.neurons import neuron_obstacle
from hf_compress.training.pieces import Piece
from hf_compress.training.shards import whole, write_

SCOPES = {"model": "class-blind", "layer": "class-uniform"}


class NeuronPruning(Pruning):
    """Callback for any `Trainer`: masks a growing share of the feed-forward neurons.

    Args:
        importance: `gradient` of the training loss, gathered since the last update; `random`; or a tensor (L, F) from
            `hfc.neuron_importance`.
        scope: whether the share is one of the whole `model`, or of each `layer`, which keeps widths equal.
        multiple_of: so many neighbours go together, which a quantizer with that `group_size` needs.
        incoming, outgoing: strengths of the penalty sum_i ||w_i|| of the weights into and out of each neuron i, a
            proximal step each time the optimizer makes one, while the schedule runs; none when 0.
        norm: `l2`, or `max` for the largest magnitude.
        sparsity, schedule, begin, end, num_updates, regrow: see `Pruning`.
    """

    name = "neuron_pruning"

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        importance: str | Tensor = "gradient",
        scope: str = "model",
        multiple_of: int = 1,
        incoming: float = 0.0,
        outgoing: float = 0.0,
        norm: str = "l2",
        **options,
    ):
        if min(incoming, outgoing) < 0 or norm not in ROW_PENALTIES:
            raise ValueError(
                f"incoming and outgoing are strengths of a penalty, 0 or more, and norm one of "
                f"{', '.join(ROW_PENALTIES)}: got {incoming}, {outgoing} and {norm!r}."
            )
        self.incoming, self.outgoing, self.norm = incoming, outgoing, norm
        if multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, got {multiple_of}.")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}.")
        self.scope, self.multiple_of, self.units = SCOPES[scope], multiple_of, {"neurons": multiple_of}
        if isinstance(importance, Tensor) and multiple_of > 1:
            importance = _summed(importance, multiple_of)
        super().__init__(sparsity, score=unit_score(importance, normalize=False), **options)

    def matrices(self, model: nn.Module) -> list[Blocks]:
        found, size, names = [], self.multiple_of, module_names(model)
        for layer in anatomy(model).layers:
            part = layer.feed_forward
            if part.num_neurons % size:
                raise ValueError(f"multiple_of={size} does not divide the {part.num_neurons} neurons of {layer.name}.")
            halves = torch.arange(part.num_neurons * (2 if part.is_fused else 1)).split(max(part.num_neurons, 1))
            sources = tuple(Source(module, rows.tolist(), size) for module in part.inputs for rows in halves)
            if part.num_neurons:
                found.append(Blocks(names[part.output], part.output, (out_features(part.output), size), sources))
        if isinstance(self.score, Given):
            per_matrix_importance(self.score.importance, found, "neurons")
        return found

    def shrink(self, learning_rate: float) -> None:
        shrunk = ROW_PENALTIES[self.norm]
        for matrix in self._matrices:
            if self.outgoing:
                columns = whole(matrix.weight).T  # (F, D)
                write_(matrix.weight, shrunk(columns.float(), learning_rate * self.outgoing).T)
            for module, rows, _ in matrix.sources if self.incoming else ():
                held = as_matrix(module, module.weight.detach())  # (N, K), a view
                weight = whole(held)
                weight[rows] = shrunk(weight[rows].float(), learning_rate * self.incoming).to(weight.dtype)
                write_(held, weight)

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_prunable(model, type(self).__name__)
        layers = anatomy(model).layers
        check_cuts(
            model, [m for layer in layers for m in (*layer.feed_forward.inputs, layer.feed_forward.output)],
            self.matrices(model), "Prune with multiple_of={group}, or quantize with group_size=-1.",
        )  # fmt: skip
        for layer in layers:
            if (obstacle := neuron_obstacle(layer)) is not None:
                raise ValueError(obstacle)


def _summed(importance: Tensor, size: int) -> Tensor:
    """(L, F) -> (L, F / size): what `size` neighbours matter together; nan where a layer has fewer."""
    if importance.shape[-1] % size:
        raise ValueError(f"multiple_of={size} does not divide the {importance.shape[-1]} neurons of importance.")
    return importance.unflatten(-1, (-1, size)).sum(-1)


@dataclass
class NeuronPruningConfig(PruningConfig):
    sparsity: float = field(default=0.5, metadata={"help": "Share of the neurons that go, at least 0 and below 1."})
    importance: str = field(
        default="gradient", metadata={"help": "`gradient` of the loss with respect to a neuron's gate, or `random`."}
    )
    scope: str = field(
        default="model", metadata={"help": "The share is one of the whole `model`, or of each `layer` (equal widths)."}
    )
    multiple_of: int = field(
        default=1, metadata={"help": "So many neighbours go together, as a quantizer with that group_size needs."}
    )
    incoming: float = field(default=0.0, metadata={"help": "Penalty on the weights into each neuron; 0 for none."})
    outgoing: float = field(default=0.0, metadata={"help": "Penalty on the weights out of each neuron; 0 for none."})
    norm: str = field(default="l2", metadata={"help": "The norm of a neuron's weights in it: `l2` or `max`."})

    callback_class = NeuronPruning


class NeuronPruningTrainer(PruningTrainer):
    config_class = NeuronPruningConfig
