"""Weight pruning: single weights of the linear maps go, by magnitude, movement or activation-weighted magnitude.

Magnitude: See et al. 2016, https://arxiv.org/abs/1606.09274; gradually: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878;
movement: Sanh et al. 2020, https://arxiv.org/abs/2005.07683; Wanda: Sun et al. 2023, https://arxiv.org/abs/2306.11695;
dense-sparse-dense: Han et al. 2017, https://arxiv.org/abs/1607.04381; reweighted proximal pruning: Guo et al. 2019,
https://arxiv.org/abs/1909.12486
"""

from dataclasses import dataclass, field

from torch import nn

from hf_compress.model.anatomy import anatomy, in_features
from hf_compress.pruning.callback import Pruning
from hf_compress.pruning.masks import Blocks, layer_projections
from hf_compress.pruning.proximal import reweighted_threshold, soft_threshold_
from hf_compress.pruning.scores import Magnitude, Movement, Wanda
from hf_compress.pruning.trainer import PruningConfig, PruningTrainer

METHODS = {"magnitude": Magnitude, "movement": Movement, "wanda": Wanda}


class WeightPruning(Pruning):
    """Callback for any `Trainer`: masks a growing share of the weights of all linear maps within the layers.

    Args:
        method: `magnitude`, `movement` or `wanda`: by which score weights go.
        scope: what the share is one of: `class-blind` (all), `class-uniform` (each matrix), `class-distribution` (all,
            by magnitudes in standard deviations of their matrix), `row`, or `bank`.
        bank_size: with scope `bank`, the weights of a row among which the same number stays: sparsity 0.5 with banks
            of 4 is 2:4.
        proximal: gamma of the penalty gamma * sum |w| / |w_before|, a proximal step each time the optimizer makes one,
            while the schedule runs; none when 0.
        sparsity, schedule, begin, end, num_updates: see `Pruning`.
        regrow: share of the training after which all weights may grow again (dense-sparse-dense); never when None.
        grow: share of what stays that was held back and has the steepest gradients (grow and prune); none when 0.
    """

    name = "weight_pruning"

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        method: str = "magnitude",
        scope: str = "class-blind",
        bank_size: int | None = None,
        proximal: float = 0.0,
        **options,
    ):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
        check_bank(scope, bank_size)
        if proximal < 0:
            raise ValueError(f"proximal is the strength of a penalty, 0 or more, got {proximal}.")
        self.scope, self.bank_size, self.proximal = scope, bank_size, proximal
        super().__init__(sparsity, score=METHODS[method](), **options)

    def matrices(self, model: nn.Module) -> list[Blocks]:
        found = layer_projections(model, anatomy(model))
        check_bank(self.scope, self.bank_size, found)
        return found

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if self.proximal:  # alpha is of the weights as they are before the step
            self._before = [matrix.weight.clone() for matrix in self._matrices]

    def shrink(self, learning_rate: float) -> None:
        if self.proximal:
            for matrix, before in zip(self._matrices, self._before, strict=True):
                soft_threshold_(matrix.weight, reweighted_threshold(before, learning_rate * self.proximal))


def check_bank(scope: str, bank_size: int | None, matrices: list[Blocks] | None = None) -> None:
    """Raise ValueError unless banks are asked for with a size, one that divides the rows of `matrices`."""
    if (scope == "bank") != (bank_size is not None):
        raise ValueError(f"bank_size belongs to scope='bank', and to no other: got scope={scope!r}, {bank_size=}.")
    if bank_size is not None and bank_size < 1:
        raise ValueError(f"bank_size must be at least 1, got {bank_size}.")
    for matrix in matrices or [] if bank_size else []:
        if matrix.grid[1] % bank_size:
            raise ValueError(
                f"bank_size={bank_size} does not divide the {matrix.grid[1]} columns of {matrix.name} "
                f"({in_features(matrix.module)} weights a row). Choose a divisor."
            )


@dataclass
class WeightPruningConfig(PruningConfig):
    sparsity: float = field(default=0.5, metadata={"help": "Share of the weights that go, at least 0 and below 1."})
    method: str = field(default="magnitude", metadata={"help": f"Score by which weights go: {', '.join(METHODS)}."})
    scope: str = field(
        default="class-blind",
        metadata={"help": "The share is one of: class-blind, class-uniform, class-distribution, row, bank."},
    )
    bank_size: int | None = field(default=None, metadata={"help": "With scope `bank`: weights in a bank; 4 for 2:4."})
    proximal: float = field(default=0.0, metadata={"help": "Strength of reweighted proximal pruning; 0 for none."})
    regrow: float | None = field(
        default=None, metadata={"help": "Share of the training after which all weights may grow again (DSD)."}
    )
    grow: float = field(
        default=0.0, metadata={"help": "Share of what stays that was held back, by its gradient (grow and prune)."}
    )

    callback_class = WeightPruning
    option_names = {"method": "score"}  # in recipes, where `method` names the stage's


class WeightPruningTrainer(PruningTrainer):
    config_class = WeightPruningConfig
