"""Head pruning: while a model trains, the attention heads that matter least fall silent, and are cut in the end.

Michel et al., 2019, https://arxiv.org/abs/1905.10650

    importance of a head = mean over examples of |d loss / d gate|, divided by the L2 norm of its layer's
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy, module_names, out_features
from hf_compress.pruning.callback import Pruning, per_matrix_importance
from hf_compress.pruning.masks import Blocks
from hf_compress.pruning.scores import GateGradient, Given, Random, Score
from hf_compress.pruning.trainer import PruningConfig, PruningTrainer

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

    def __init__(self, sparsity: float = 0.4, *, importance: str | Tensor = "gradient", **options):
        super().__init__(sparsity, score=unit_score(importance, normalize=True), **options)

    def matrices(self, model: nn.Module) -> list[Blocks]:
        names, found, groups = module_names(model), [], []
        for attention in anatomy(model).attentions:
            if not attention.num_heads:
                continue  # cut before
            group = attention.num_heads // attention.num_key_value_heads
            shape = (out_features(attention.output), group * attention.head_dim)
            found.append(Blocks(names[attention.output], attention.output, shape))
            groups.append(group)
        if isinstance(self.score, Given):
            if any(group > 1 for group in groups):
                raise ValueError("Heads of this model share keys and values: use importance='gradient' to prune it.")
            per_matrix_importance(self.score.importance, found, "heads")
        return found


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
