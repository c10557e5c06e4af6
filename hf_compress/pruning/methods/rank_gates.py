"""FLOP: the ranks of factorised maps are learned, by a gate on each component, until a size is reached.

Wang et al., 2020, https://arxiv.org/abs/1910.04732 (eq. 67 of the text survey), with the gates of `hard_concrete`

    W = P G Q = sum over k of gate_k p_k q_k^T
    s = 1 - sum over gates of (N + K) P(gate > 0) / sum of (N + K), the expected share of the weights that goes
    max over m_1, m_2 of min over all else of  loss + m_1 (s - t) + m_2 (s - t)^2

t rises linearly to the share that was asked for; the multipliers m follow their gradient upwards from 0. At the end the
components with the largest log_alpha that fit in the size stay, and the factors of a smaller rank are what is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from hf_compress.layers.low_rank import FACTORS, LowRankLinear, SharedLowRankLinear
from hf_compress.model.anatomy import module_names
from hf_compress.model.record import read_part
from hf_compress.model.weights import check_no_adapters
from hf_compress.pruning.low_rank import record_ranks
from hf_compress.pruning.methods.hard_concrete import GatesConfig, LearnedGates, open_probability
from hf_compress.pruning.trainer import PruningTrainer
from hf_compress.training.optimizers import versions
from hf_compress.training.pieces import Piece
from hf_compress.training.shards import own, part


class RankGates(LearnedGates):
    """Callback for the trainers of hf_compress: `finish` takes out components of factorised maps.

    Args:
        sparsity: share of the factors' weights that is gone at the end, above 0 and below 1.
        warm_up: share of the training over which the target rises to it.
        multiplier_rate: how fast the multipliers follow their gradient.
        gate_rate, initial, end: as in `LearnedGates`; the size is `sparsity` from `end` on, to a component.

    Factorise the model first, at ranks that lose little: `hfc.factorise(model, budget=0.9)`. Raises ValueError
    for a model that has no factorised map.
    """

    name = "rank_gates"

    def __init__(self, sparsity: float = 0.5, *, warm_up: float = 0.3, multiplier_rate: float = 10.0,
                 gate_rate: float = 1000.0, initial: float = 2.0, end: float = 0.7):  # fmt: skip
        if not 0 < sparsity < 1 or not 0 <= warm_up <= end or multiplier_rate <= 0:
            raise ValueError(
                "sparsity lies between 0 and 1, warm_up between 0 and end, and multiplier_rate is above 0: got "
                f"{sparsity}, {warm_up} (end={end}) and {multiplier_rate}."
            )
        super().__init__(gate_rate=gate_rate, initial=initial, end=end)
        self.sparsity, self.warm_up, self.multiplier_rate = sparsity, warm_up, multiplier_rate

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_no_adapters(model)
        is_whole = isinstance(model, PreTrainedModel)
        if not is_whole or any(read_part(model.config, part) for part in ("bits", "sparsity")):
            raise ValueError(
                f"{type(self).__name__} changes a Transformers model and its config, and no quantized or block-sparse "
                f"weights: got {type(model).__name__}. Pass the model inside it, or dequantize it first."
            )
        self.places(model)

    def places(self, model: nn.Module) -> list[LowRankLinear]:
        table = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # may be tied
        found = [module for module in model.modules() if isinstance(module, LowRankLinear) and module is not table]
        if not found:
            raise ValueError(
                f"{type(self).__name__} needs maps that are products, and {type(model).__name__} has none in its "
                "layers: call hfc.factorise(model, rank=...) first."
            )
        if any(isinstance(module, SharedLowRankLinear) for module in found):
            raise ValueError(
                f"{type(self).__name__} takes components out of each map, but maps of this {type(model).__name__} "
                "share their projections: call hfc.factorise without shared=True."
            )
        return found

    def num_gates(self, place: LowRankLinear) -> int:
        return place.rank

    def training_state_entries(self, model: nn.Module) -> dict[str, nn.Parameter | Tensor]:
        return {**super().training_state_entries(model), f"{self.name}_multipliers": torch.zeros(2)}

    @property
    def multipliers(self) -> Tensor:
        return getattr(self._state, f"{self.name}_multipliers")

    def attach(self, number: int) -> "_GatedForward":
        return _GatedForward(self, number, self._places[number])

    @torch.no_grad()
    def slopes(self, state: TrainerState) -> list[Tensor]:
        """Those of the Lagrangian; the multipliers, which they are taken at, step upwards."""
        p, sizes = [open_probability(self.log_alpha(i)) for i in range(len(self._places))], self._sizes()
        total = sum(size * len(q) for size, q in zip(sizes, p, strict=True))
        share = 1 - sum(size * q.sum() for size, q in zip(sizes, p, strict=True)) / total
        rise = (state.global_step + 1) / max(self.warm_up * state.max_steps, 1)
        excess = share - self.sparsity * min(rise, 1.0)
        slope = self.multipliers[0] + 2 * self.multipliers[1] * excess
        self.multipliers.add_(self.multiplier_rate * torch.stack([excess, excess.square()]))
        return [-slope * size / total * q * (1 - q) for size, q in zip(sizes, p, strict=True)]

    def chosen(self) -> list[Tensor]:
        scores, ranks = [self.log_alpha(i).detach() for i in range(len(self._places))], [p.rank for p in self._places]
        order = torch.cat(scores).argsort(descending=True, stable=True)
        sizes = torch.tensor(self._sizes(), device=order.device).repeat_interleave(torch.tensor(ranks).to(order.device))
        fits = sizes[order].cumsum(0) <= (1 - self.sparsity) * int(sizes.sum())
        return list(torch.zeros_like(fits).scatter(0, order, fits).split(ranks))

    def _sizes(self) -> list[int]:
        """The weights of one component of each place."""
        return [place.in_features + place.out_features for place in self._places]

    def silence_(self, place: LowRankLinear, is_open: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        for name in FACTORS:
            for factor in versions(getattr(place, name), optimizer):
                own(factor)[:, ~is_open[part(factor, 1)]] = 0

    def cut(self, model: PreTrainedModel) -> None:
        """A map that has lost all of its components keeps one, of zeros."""
        names, ranks = module_names(model), {}
        for place, is_open in zip(self._places, self._open, strict=True):
            keep = is_open.nonzero().flatten() if is_open.any() else torch.zeros(1, dtype=torch.long)
            for name in FACTORS:
                old = getattr(place, name)
                setattr(place, name, nn.Parameter(old.detach()[:, keep.to(old.device)].contiguous(), old.requires_grad))
            ranks[names[place]] = place.rank
        record_ranks(model, ranks)


class _GatedForward:
    """The forward of a map with its gates between the two factors, until it is removed."""

    def __init__(self, owner: RankGates, number: int, module: LowRankLinear):
        self.owner, self.number, self.module = owner, number, module
        module.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        components = x @ module.projection  # (..., R)
        gates = self.owner.gates_of(self.number, is_noisy=module.training)
        return F.linear(components * gates.to(components.dtype), module.table, module.bias)

    def remove(self) -> None:
        vars(self.module).pop("forward", None)


@dataclass
class RankGatesConfig(GatesConfig):
    gates = RankGates

    sparsity: float = field(default=0.5, metadata={"help": "Share of the factors' weights that goes, above 0 to 1."})
    warm_up: float = field(default=0.3, metadata={"help": "Share of the training over which the target rises."})
    multiplier_rate: float = field(default=10.0, metadata={"help": "How fast the multipliers rise; above 0."})


class RankGatesTrainer(PruningTrainer):
    config_class = RankGatesConfig
