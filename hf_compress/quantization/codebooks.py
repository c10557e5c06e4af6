"""Grids whose levels need not be evenly spaced: each row of weights has its own few values.

Every function takes rows (..., g) and gives their `levels` (..., L) in ascending order; `nearest_level` says which of
them each weight takes, unless the method has a rule of its own (`RULES`). Such a grid is stored as packed indices and
its levels.

    balanced       the same number of weights at each level (Zhou et al., 2017, https://arxiv.org/abs/1706.07145)
    k-means        levels are centroids (Han et al., 2016, https://arxiv.org/abs/1510.00149), of weights that count by
                   the Hessian's diagonal if it is known (Choi et al., 2017, https://arxiv.org/abs/1612.01543)
    power of two   plus and minus a power of two, so products are shifts (Zhou et al., 2017, https://arxiv.org/abs/1702.03044)
    binary         plus and minus the mean magnitude (Rastegari et al., 2016, https://arxiv.org/abs/1603.05279)
    ternary        zero too, below 0.7 of the mean magnitude (Li et al., 2016, https://arxiv.org/abs/1605.04711)
    multi-bit      sums of plus and minus b coefficients (Xu et al., 2018, https://arxiv.org/abs/1802.00150)
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import anatomy
from hf_compress.model.calibration import StackInputs, capture_stack_inputs, input_hooks
from hf_compress.quantization.grids import check_weight, group_rows
from hf_compress.quantization.modules import matrix

KMEANS_ROUNDS = 25
ALTERNATIONS = 8  # rounds of multi-bit's alternating minimisation; Xu et al. find two enough to train with
TERNARY_THRESHOLD = 0.7  # of the mean magnitude


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Index (..., g) of the level (..., L) nearest to each value (..., g); levels ascend."""
    between = (levels[..., 1:] + levels[..., :-1]) / 2
    return torch.searchsorted(between.contiguous(), values.contiguous())


def take_level(index: Tensor, levels: Tensor) -> Tensor:
    """The values (..., g) that `index` stands for."""
    return levels.gather(-1, index)


def balanced_levels(values: Tensor, bits: int) -> Tensor:
    """Means of 2^bits parts of equal population."""
    ordered = values.sort(-1).values
    parts = [part.mean(-1) for part in ordered.tensor_split(2**bits, dim=-1) if part.shape[-1]]
    return torch.stack(parts + [parts[-1]] * (2**bits - len(parts)), -1)


def part_of_rank(values: Tensor, num_levels: int) -> Tensor:
    """Index (..., g) of the part of equal population that each value falls into, equal values in their order."""
    sizes = [len(part) for part in torch.arange(values.shape[-1]).tensor_split(num_levels)]
    parts = torch.arange(num_levels).repeat_interleave(torch.tensor(sizes)).to(values.device)  # (g,), of each rank
    order = values.sort(dim=-1, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, parts.expand_as(order))


def kmeans_levels(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Centroids by Lloyd's rounds, from evenly spaced ones (Han et al. find these the best start).

    `importance`, of the shape of `values`, is how much each squared error counts: h_ii, the Hessian's diagonal. A
    centroid is then sum h_ii w_i / sum h_ii (Choi et al., eq. 7).
    """
    h = torch.ones_like(values) if importance is None else importance.to(values.dtype).expand_as(values)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    levels = low + (high - low) * torch.linspace(0, 1, 2**bits, dtype=values.dtype, device=values.device)
    for _ in range(KMEANS_ROUNDS):
        index = nearest_level(values, levels)
        sums = torch.zeros_like(levels).scatter_add_(-1, index, h * values)
        mass = torch.zeros_like(levels).scatter_add_(-1, index, h)
        levels = torch.where(mass > 0, sums / mass, levels).sort(-1).values
    return levels


def power_of_two_levels(values: Tensor, bits: int) -> Tensor:
    """Zero and +-2^k for the 2^(bits - 1) - 1 exponents from the largest down; one level of the 2^bits is a spare zero.

    The largest is 2^floor(log2(4/3 max |w|)), as in incremental network quantization.
    """
    largest = values.abs().amax(-1, keepdim=True)
    top = torch.floor(torch.log2((4 * largest / 3).clamp(min=torch.finfo(values.dtype).tiny)))
    steps = torch.arange(2 ** (bits - 1) - 1, dtype=values.dtype, device=values.device)
    powers = torch.exp2(top - steps) * (largest > 0)  # (..., 2^(bits - 1) - 1)
    zeros = torch.zeros_like(largest)
    return torch.cat([-powers, zeros, zeros, powers.flip(-1)], -1)


def binary_levels(values: Tensor, bits: int = 1) -> Tensor:
    """-alpha and alpha = mean |w|, the least-squares scale of the signs. Two levels, whatever `bits` says."""
    alpha = values.abs().mean(-1, keepdim=True)
    return torch.cat([-alpha, alpha], -1)


def ternary_levels(values: Tensor, bits: int = 2) -> Tensor:
    """-alpha, 0 and alpha, the mean magnitude of the weights above the threshold. Three levels."""
    magnitudes, is_large = values.abs(), _is_large(values)
    alpha = (magnitudes * is_large).sum(-1, keepdim=True) / is_large.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([-alpha, torch.zeros_like(alpha), alpha], -1)


def sign_above_threshold(values: Tensor, num_levels: int = 3) -> Tensor:
    """Index of 0 up to the threshold, else of the sign: eq. 3 of Li et al., where the nearest level may be another."""
    return 1 + (values.sign() * _is_large(values)).long()


def _is_large(values: Tensor) -> Tensor:
    magnitudes = values.abs()
    return magnitudes > TERNARY_THRESHOLD * magnitudes.mean(-1, keepdim=True)


def multibit_levels(values: Tensor, bits: int) -> Tensor:
    """All 2^bits sums of +-alpha_i; coefficients and signs by turns, from the greedy ones.

    Greedy: alpha_i = mean |residual|, b_i its sign. Then: with the signs fixed, the alphas solve least squares; with
    the alphas fixed, each weight takes the nearest sum.
    """
    residual, alphas = values, []
    for _ in range(bits):
        alpha = residual.abs().mean(-1, keepdim=True)
        alphas.append(alpha)
        residual = residual - alpha * residual.sign()
    alpha = torch.cat(alphas, -1)  # (..., bits)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=values.dtype, device=values.device)
    for _ in range(ALTERNATIONS):
        sums, order = (alpha @ signs.T).sort(-1)  # (..., 2^bits)
        chosen = signs[order.gather(-1, nearest_level(values, sums))]  # (..., g, bits)
        gram = chosen.mT @ chosen + 1e-6 * torch.eye(bits, dtype=values.dtype, device=values.device)
        alpha = torch.linalg.solve(gram, (chosen.mT @ values[..., None])[..., 0])
    return (alpha @ signs.T).sort(-1).values


CODEBOOKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "balanced": balanced_levels,
    "binary": binary_levels,
    "kmeans": kmeans_levels,
    "multibit": multibit_levels,
    "power_of_two": power_of_two_levels,
    "ternary": ternary_levels,
}
RULES: dict[str, Callable[[Tensor, int], Tensor]] = {"balanced": part_of_rank, "ternary": sign_above_threshold}
WIDTHS = {"binary": 1, "ternary": 2}  # bits that an index takes, where the method leaves no choice
NUM_LEVELS = {"binary": 2, "ternary": 3}


def corrected_levels(values: Tensor, index: Tensor, levels: Tensor) -> Tensor:
    """Levels with which each row has the mean and the spread that it had.

    Bias correction of Banner et al., 2019, https://arxiv.org/abs/1810.05723, section 5: with w' what w is rounded to,
    w' becomes mean w + xi (w' - mean w'), xi = |w - mean w| / |w' - mean w'|. Exact, since levels can be moved.
    """
    rounded = take_level(index, levels)
    mean, middle = values.mean(-1, keepdim=True), rounded.mean(-1, keepdim=True)
    spread, rounded_spread = ((x - m).norm(dim=-1, keepdim=True) for x, m in ((values, mean), (rounded, middle)))
    xi = torch.where(rounded_spread > 0, spread / rounded_spread, 1.0)
    return mean + xi * (levels - middle)


def num_codebook_levels(grid: str, bits: int, name: str) -> int:
    """How many levels a row of module `name` has. Raises ValueError for bits that the grid is not stored in."""
    if grid in WIDTHS and bits != WIDTHS[grid]:
        raise ValueError(f"{name}: a {grid} grid is stored in {WIDTHS[grid]} bits a weight, got bits={bits}.")
    return NUM_LEVELS.get(grid, 2**bits)


def install_codebook(
    model: nn.Module,
    name: str,
    scheme: WeightScheme,
    grid: str,
    *,
    importance: Tensor | None = None,
    bias_correction: bool = False,
) -> None:
    """Put a layer of indices in the place of the linear module `name`. `scheme` says bits, groups and levels.

    importance  (K,), how much the squared error of each column counts; for "kmeans"
    """
    module = model.get_submodule(name)
    weight = matrix(module).float()
    check_weight(weight, name)
    groups, dtype = group_rows(weight, scheme.group_size), SCALE_DTYPES[scheme.scale_dtype]  # (N, G, g)
    weighing = {} if importance is None else {"importance": group_rows(importance[None], scheme.group_size)}
    levels = CODEBOOKS[grid](groups, scheme.bits, **weighing).to(dtype).float()  # (N, G, L)
    index = RULES[grid](groups, levels.shape[-1]) if grid in RULES else nearest_level(groups, levels)
    if bias_correction:
        levels = corrected_levels(groups, index, levels).to(dtype).float()
    layer = CodebookLinear.like(module, scheme)
    layer.fill(index.flatten(1), levels.transpose(0, 1).contiguous())
    model.set_submodule(name, layer.train(module.training))


@torch.no_grad()
def input_importance(model: PreTrainedModel, names: Sequence[str], batches: Sequence[Mapping]) -> dict[str, Tensor]:
    """{name of a linear map: (K,)}, h_k = E[x_k^2] over the real tokens of `batches`; the factor 2 does not matter.

    Raises ValueError for maps outside the layers, and for those that no input reaches.
    """
    modules = {name: model.get_submodule(name) for name in names}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, rows: Tensor) -> None:
        sums[name] = sums.get(name, 0) + rows.double().square().sum(0)
        counts[name] += len(rows)

    with evaluating([model]):
        for stack in anatomy(model).stacks:
            _run(capture_stack_inputs(model, stack, batches), modules, add)
    if missing := sorted(name for name, count in counts.items() if not count):
        raise ValueError(f"No calibration input reached {missing}: only maps within the layers are weighed.")
    return {name: sums[name] / counts[name] for name in names}


def _run(inputs: StackInputs, modules: Mapping[str, nn.Module], add: Callable[[str, Tensor], None]) -> None:
    """Run all layers of a stack, and hand on the tokens (rows, K) that reach each of `modules`."""
    for number, layer in enumerate(inputs.stack.layers):
        inputs.index, inside = number, set(layer.module.modules())
        mine = {name: module for name, module in modules.items() if module in inside}
        for batch in range(inputs.num_batches):

            def see(name: str, x: Tensor, batch: int = batch) -> None:
                add(name, inputs.tokens(modules[name], x, batch))

            with input_hooks(mine, see):
                inputs.hidden[batch] = inputs.run(batch)
