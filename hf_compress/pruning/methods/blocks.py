"""Block pruning: square blocks of the linear maps go, so that the zeros can be skipped in practice.

Narang et al., 2017, https://arxiv.org/abs/1711.02782: a block goes when its largest weight is small, with group lasso;
Lagunas et al., 2021, https://arxiv.org/abs/2109.04838: when its summed movement score is low.
"""

from dataclasses import dataclass, field

from torch import nn

from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.callback import Pruning
from hf_compress.pruning.masks import Blocks, layer_projections
from hf_compress.pruning.methods.weights import check_bank
from hf_compress.pruning.proximal import group_lasso_factors
from hf_compress.pruning.scores import Magnitude, Movement, Taylor
from hf_compress.pruning.trainer import PruningConfig, PruningTrainer

METHODS = {"max": Magnitude, "norm": lambda: Magnitude("norm"), "movement": Movement, "taylor": Taylor}


class BlockPruning(Pruning):
    """Callback for any `Trainer`: masks a growing share of the blocks of all linear maps within the layers.

    Args:
        block_size: side of a block; it must divide all shapes.
        method: `taylor` (what the loss changes without a block, squared and summed over the steps since the last
            update), `movement` (its summed movement score), `max` (its largest magnitude) or `norm` (its L2 norm).
            Magnitudes are not comparable across matrices: use them with another scope than `class-blind`.
        scope: what the share is one of: `class-blind` (all), `class-uniform` (each matrix), `row`, or `bank`, all in
            blocks.
        bank_size: with scope `bank`, the blocks of a row of blocks among which the same number stays.
        group_lasso: lambda_g of the penalty lambda_g * sum ||block||_2, a proximal step each time the optimizer makes
            one, while the schedule runs; none when 0.
        sparsity, schedule, begin, end, num_updates, regrow, grow: see `Pruning`. With `two-slopes` and `fixed` the
            threshold is higher than that of single weights by the fourth root of the elements of a block.
    """

    name = "block_pruning"

    def __init__(
        self,
        sparsity: float = 0.75,
        *,
        block_size: int = 16,
        method: str = "taylor",
        scope: str = "class-blind",
        bank_size: int | None = None,
        group_lasso: float = 0.0,
        **options,
    ):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
        if group_lasso < 0:
            raise ValueError(f"group_lasso is the strength of a penalty, 0 or more, got {group_lasso}.")
        check_bank(scope, bank_size)
        self.block_size, self.num_elements, self.group_lasso = block_size, block_size**2, group_lasso
        self.scope, self.bank_size = scope, bank_size
        self.units = {"heads": block_size, "neurons": block_size}
        super().__init__(sparsity, score=METHODS[method](), **options)

    def matrices(self, model: nn.Module) -> list[Blocks]:
        found = layer_projections(model, anatomy(model), self.block_size)
        check_bank(self.scope, self.bank_size, found)
        return found

    def shrink(self, learning_rate: float) -> None:
        if self.group_lasso:
            for matrix in self._matrices:
                squared_norms = matrix.sum(matrix.weight.float() ** 2)
                matrix.scale_(group_lasso_factors(squared_norms, learning_rate * self.group_lasso))


@dataclass
class BlockPruningConfig(PruningConfig):
    sparsity: float = field(default=0.75, metadata={"help": "Share of the blocks that go, at least 0 and below 1."})
    block_size: int = field(default=16, metadata={"help": "Side of a block, usually 4 to 64."})
    method: str = field(default="taylor", metadata={"help": f"Score by which blocks go: {', '.join(METHODS)}."})
    scope: str = field(
        default="class-blind", metadata={"help": "The share is one of: class-blind, class-uniform, row, bank."}
    )
    bank_size: int | None = field(default=None, metadata={"help": "With scope `bank`: blocks in a bank."})
    group_lasso: float = field(default=0.0, metadata={"help": "Strength of the group lasso; 0 for none."})

    callback_class = BlockPruning
    option_names = {"method": "score"}  # in recipes, where `method` names the stage's


class BlockPruningTrainer(PruningTrainer):
    config_class = BlockPruningConfig
