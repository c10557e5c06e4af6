"""Head pruning: while a model trains, the attention heads that matter least fall silent, and are cut in the end.

Michel et al., 2019, https://arxiv.org/abs/1905.10650

    importance of a head = mean over examples of |d loss / d gate|, divided by the L2 norm of its layer's
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy, module_names, out_features
from hf_compress.pruning.callback import Pruning, check_cuts, per_matrix_importance
from hf_compress.pruning.masks import Blocks, Source, check_prunable
from hf_compress.pruning.scores import GateGradient, Given, Random, Score
from hf_compress.pruning.trainer import PruningConfig, PruningTrainer
from hf_compress.surgery.heads import head_obstacle
from hf_compress.training.pieces import Piece

IMPORTANCES = ("gradient", "random")


class HeadPruning(Pruning):
    """Callback for any `Trainer`: masks a growing share of all heads.

    Args:
        importance: `gradient` of the training loss (a distillation loss, too), gathered since the last update;
            `random`; or a tensor (L, H) from `hfc.head_importance`.
        sparsity, schedule, begin, end, num_updates, regrow: see `Pruning`.

    Heads that share a key and value are masked together; their importances are added.
    """

    name = "head_pruning"
    units = {"heads": 1}

    def __init__(self, sparsity: float = 0.4, *, importance: str | Tensor = "gradient", **options):
        super().__init__(sparsity, score=unit_score(importance, normalize=True), **options)

    def matrices(self, model: nn.Module) -> list[Blocks]:
        found = head_matrices(model)
        if isinstance(self.score, Given):
            if any(matrix.shape[1] > matrix.sources[0].size for matrix in found):
                raise ValueError("Heads of this model share keys and values: use importance='gradient' to prune it.")
            per_matrix_importance(self.score.importance, found, "heads")
        return found

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_prunable(model, type(self).__name__)
        check_heads(model)


def head_matrices(model: nn.Module) -> list[Blocks]:
    """The output projections of the attentions that have heads, a block for each key and value."""
    names, found = module_names(model), []
    for attention in anatomy(model).attentions:
        if attention.num_heads:  # else they were cut before
            group = attention.num_heads // attention.num_key_value_heads
            shape = (out_features(attention.output), group * attention.head_dim)
            values = Source(attention.value, attention.value_rows, attention.head_dim)
            found.append(Blocks(names[attention.output], attention.output, shape, (values,)))
    return found


def check_heads(model: nn.Module) -> None:
    """Raise ValueError, before the first step, for a model whose heads cannot be cut."""
    names, attentions = module_names(model), [a for a in anatomy(model).attentions if a.num_heads]
    check_cuts(
        model, [m for a in attentions for m in (a.query, a.key, a.value, *a.positional, a.output)],
        head_matrices(model), "Choose a group_size that divides {columns}, or -1.",
    )  # fmt: skip
    for attention in attentions:
        if (obstacle := head_obstacle(attention, names)) is not None:
            raise ValueError(obstacle)


def unit_score(importance: str | Tensor, *, normalize: bool) -> Score:
    """The score of heads or neurons that `importance` stands for."""
    if isinstance(importance, Tensor):
        return Given(importance)
    if importance not in IMPORTANCES:
        raise ValueError(f"importance must be a tensor or one of {', '.join(IMPORTANCES)}, got {importance!r}.")
    return GateGradient(normalize=normalize) if importance == "gradient" else Random()


@dataclass
class HeadPruningConfig(PruningConfig):
    sparsity: float = field(default=0.4, metadata={"help": "Share of all heads that go, at least 0 and below 1."})
    importance: str = field(
        default="gradient", metadata={"help": "`gradient` of the loss with respect to a head's gate, or `random`."}
    )

    callback_class = HeadPruning


class HeadPruningTrainer(PruningTrainer):
    config_class = HeadPruningConfig
