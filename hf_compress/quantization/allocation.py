"""Which module gets how many bits: the exact optimum of a budgeted choice.

Q-BERT (Shen et al., 2020, https://arxiv.org/abs/1909.05840) gives more bits to sensitive layers; HAWQ-V3 solves the
choice as an integer program. Here, for each module i and width b,

    cost_i(b) = sensitivity_i * ||W_i - Q_b(W_i)||^2

and the sum of costs is least under a budget of bits. Of all partial choices only those are kept that no other one beats
in both size and cost; the best of what is left is the optimum.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_compress.layers.scheme import WeightScheme, check_bits
from hf_compress.model.anatomy import is_projection
from hf_compress.quantization.grids import round_to_nearest
from hf_compress.quantization.modules import check_quantizable, matrix, scheme_for

CHOICES = (2, 3, 4, 8)


@torch.no_grad()
def allocate_bits(
    model: nn.Module,
    sensitivity: Mapping[str, float],
    *,
    average_bits: float | None = None,
    size_bytes: int | None = None,
    choices: Sequence[int] = CHOICES,
    group_size: int | str = "auto",
    symmetric: bool = False,
    errors: Mapping[str, Mapping[int, float]] | None = None,
) -> dict[str, int]:
    """Bits for each module of `sensitivity`, best under one of two budgets.

    Args:
        sensitivity: {module name: value}, as `hessian_sensitivity` returns it; negative values count as zero.
        average_bits: mean bits of a weight, scales and zero points not counted.
        size_bytes: bytes of these modules as stored, scales and zero points counted.
        errors: {module name: {bits: squared error}} in place of ||W - Q_b(W)||^2 by rounding to nearest.

    Returns {module name: bits}, ready for `quantize(model, bits=...)`. Raises ValueError for a budget below the
    smallest possible size, and for modules that cannot be quantized.
    """
    if (average_bits is None) == (size_bytes is None):
        raise ValueError("Give one budget: average_bits or size_bytes.")
    if not sensitivity:
        raise ValueError("sensitivity is empty: there is nothing to choose for.")
    for bits in choices:
        check_bits(bits)
    if average_bits is not None and not 0 < average_bits <= max(choices):
        raise ValueError(f"average_bits is above 0 and at most the {max(choices)} of the choices, got {average_bits}.")
    costs, sizes = [], []
    for name, value in sensitivity.items():
        module = check_quantizable(model, name)
        if not is_projection(module) and not isinstance(module, nn.Embedding):
            raise ValueError(f"{name} is not a linear layer or an embedding.")
        weight = matrix(module)
        found = dict(errors[name]) if errors is not None else {}
        for bits in choices:
            scheme = scheme_for(module, name, bits, group_size=group_size, symmetric=symmetric)
            if errors is None:
                found[bits] = float((round_to_nearest(weight, scheme, name=name).dequantize() - weight).square().sum())
            sizes.append(_stored_bits(weight, scheme) if average_bits is None else weight.numel() * bits)
        costs.append([max(float(value), 0.0) * found[bits] for bits in choices])
    sizes = torch.tensor(sizes).view(len(costs), len(choices))
    weights = sum(matrix(model.get_submodule(name)).numel() for name in sensitivity)
    budget = int(average_bits * weights) if average_bits is not None else 8 * size_bytes
    smallest = int(sizes.amin(1).sum())
    if budget < smallest:
        least = f"average_bits={smallest / weights:.3g}" if size_bytes is None else f"size_bytes={-(-smallest // 8)}"
        raise ValueError(f"The budget is below the smallest possible size with choices {tuple(choices)}: {least}.")
    chosen = cheapest_choice(torch.tensor(costs, dtype=torch.float64), sizes, budget)
    return {name: choices[index] for name, index in zip(sensitivity, chosen, strict=True)}


def _stored_bits(weight: Tensor, scheme: WeightScheme) -> int:
    return round(scheme.bits_per_weight(*weight.shape) * weight.numel())


def cheapest_choice(costs: Tensor, sizes: Tensor, budget: int) -> list[int]:
    """For each row one column, so that the sizes add up to at most `budget` and the costs to as little as possible.

    costs (n, c) float64, sizes (n, c) whole. Exact: a partial choice is dropped only where another one is no larger
    and no dearer.
    """
    remaining = torch.cat([sizes.amin(1).flip(0).cumsum(0).flip(0)[1:], sizes.new_zeros(1)])  # the least the rest needs
    frontier_size, frontier_cost = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []  # for each row: where each point came from, and by which column
    for row, (cost, size) in enumerate(zip(costs, sizes.long(), strict=True)):
        new_size = (frontier_size[:, None] + size).flatten()
        new_cost = (frontier_cost[:, None] + cost).flatten()
        fits = (new_size + remaining[row] <= budget).nonzero()[:, 0]
        order = fits[torch.argsort(new_cost[fits], stable=True)]
        order = order[torch.argsort(new_size[order], stable=True)]  # by size, then by cost
        best_before = torch.cummin(new_cost[order], 0).values
        is_better = torch.ones(len(order), dtype=torch.bool)
        is_better[1:] = new_cost[order][1:] < best_before[:-1]
        kept = order[is_better]
        steps.append((kept // len(cost), kept % len(cost)))
        frontier_size, frontier_cost = new_size[kept], new_cost[kept]
    point, chosen = len(frontier_cost) - 1, []
    for came_from, column in reversed(steps):
        chosen.append(int(column[point]))
        point = int(came_from[point])
    return chosen[::-1]
