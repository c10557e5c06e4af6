"""SignRound: which way each weight of a layer is rounded is learned, by signed gradients of the layer's output error.

Cheng et al., 2023, https://arxiv.org/abs/2309.05516, known by its tool as AutoRound (AdaRound, Nagel et al., 2020,
https://arxiv.org/abs/2004.10568, learns the same map by map)

    s = (alpha high - beta low) / (2^b - 1),  z = round(-beta low / s)                      (eq. 6)
    q = clip(round(W / s + z + V), 0, 2^b - 1),  W~ = s (q - z)                             (eq. 3)
    V, alpha, beta -= lr sign(d |f(W~) - f(W)|^2),  gradients straight through the rounding (eq. 5)

with V in [-1/2, 1/2]. [low, high] is the range that `range_method` finds, of which alpha and beta leave half at least;
they may widen it again to all values of the group.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.model.anatomy import Layer, matrix
from hf_compress.model.calibration import StackInputs, input_groups
from hf_compress.quantization.block_by_block import BlockOptions, Walk
from hf_compress.quantization.grids import (
    RANGES,
    QuantizedWeight,
    check_weight,
    dequantize_from_grid,
    grid_from_range,
    group_rows,
    minmax_range,
    of_groups,
    round_scale,
)
from hf_compress.quantization.modules import set_matrix

logger = logging.getLogger(__name__)

LEAST_RANGE = 0.5  # alpha and beta leave half of the range at least
VERDICTS = 10  # so often on the way the error over the whole calibration is taken, to keep the best


@dataclass(frozen=True)
class SignRoundOptions(BlockOptions):
    """How `quantize(method="signround")` works, beside the options of any walk.

    steps              signed steps for each layer, each on one batch of the calibration
    learning_rate      of the first step, from which it falls to none; None for 1 / steps, which lets a rounding turn
    learn_ranges       also learn how much of its range each group covers
    """

    steps: int = 200
    learning_rate: float | None = None
    learn_ranges: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1 or (self.learning_rate is not None and not 0 < self.learning_rate <= 1):
            raise ValueError(
                f"steps must be positive and learning_rate above 0 and up to 1, got {self.steps} and "
                f"{self.learning_rate}."
            )


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of `value`."""
    return rounded.detach() + (value - value.detach())


class Rounding:
    """What is learned of one weight (N, K): V (N, G, g) of each value, alpha and beta (N, G, 1) of each group.

    At first they round to the nearest value of the grid that `range_method` finds.
    """

    def __init__(self, weight: Tensor, scheme: WeightScheme, *, range_method: str = "mse", learn_ranges: bool = True):
        self.bits, self.symmetric = scheme.bits, scheme.symmetric
        self.scale_dtype = SCALE_DTYPES[scheme.scale_dtype]
        self.W = group_rows(weight if weight.dtype == torch.float64 else weight.float(), scheme.group_size)  # (N, G, g)
        full = minmax_range(self.W, self.bits)
        found = RANGES[range_method](self.W, self.bits, symmetric=self.symmetric)
        self.low, self.high = found[0].clamp(max=0), found[1].clamp(min=0)
        self.V = torch.zeros_like(self.W)
        self.alpha, self.beta = torch.ones_like(self.high), torch.ones_like(self.low)
        self.learned = [self.V] + ([self.alpha, self.beta] if learn_ranges else [])
        self.most = [torch.where(part != 0, end / part, 1.0).clamp(min=1)  # up to the whole range
                     for part, end in ((self.high, full[1]), (self.low, full[0]))]  # fmt: skip

    def grid(self) -> tuple[Tensor, Tensor]:
        low, high = self.beta * self.low, self.alpha * self.high
        scale, zero = grid_from_range(low, high, self.bits, symmetric=self.symmetric)
        if not self.symmetric:
            zero = straight_through(-low / scale, zero)
        return straight_through(scale, round_scale(scale, self.scale_dtype)), zero

    def integers(self, scale: Tensor, zero: Tensor) -> Tensor:
        position = self.W / scale + zero + self.V
        return straight_through(position, position.round()).clamp(0, 2**self.bits - 1)

    def weight(self) -> Tensor:
        """W~ (N, K), differentiable in what is learned."""
        scale, zero = self.grid()
        return dequantize_from_grid(self.integers(scale, zero), scale, zero).flatten(1)

    def step(self, gradients: Iterable[Tensor], rate: float) -> None:
        for learned, gradient in zip(self.learned, gradients, strict=True):
            learned.sub_(rate * gradient.sign())
        self.V.clamp_(-0.5, 0.5)
        for share, most in zip((self.alpha, self.beta), self.most, strict=True):
            torch.minimum(share.clamp_(min=LEAST_RANGE), most, out=share)

    def result(self) -> QuantizedWeight:
        scale, zero = self.grid()
        return of_groups(self.integers(scale, zero), scale, zero)


Weights = Mapping[str, Tensor]


@torch.no_grad()
def learn(
    roundings: Mapping[str, Rounding], outputs: Callable[[int, Weights], Tensor], targets: Callable[[int], Tensor],
    num_batches: int, *, steps: int, rate: float, name: str = "the layer",
) -> tuple[float, float]:  # fmt: skip
    """Changes `roundings`: they are the best of those on the way. Returns the mean squared error before and after.

    outputs(batch, weights)  what comes out with `weights`, by name, (rows, D)
    targets(batch)           what should
    """

    def difference(batch: int, weights: Weights) -> Tensor:
        y = outputs(batch, weights)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return y - targets(batch).to(y)

    def total_error() -> float:
        weights = {key: rounding.weight() for key, rounding in roundings.items()}
        errors = [difference(batch, weights).double().square() for batch in range(num_batches)]
        return float(sum(error.sum() for error in errors)) / sum(error.numel() for error in errors)

    learned = [tensor for rounding in roundings.values() for tensor in rounding.learned]
    first = best = total_error()
    if not torch.tensor(first).isfinite():
        raise ValueError(f"The outputs of {name} were NaN or infinite on the calibration. Check the model on it.")
    kept = [tensor.clone() for tensor in learned]
    for step in range(steps):
        batch = step % num_batches
        with torch.enable_grad():
            for tensor in learned:
                tensor.requires_grad_()
            weights = {key: rounding.weight() for key, rounding in roundings.items()}
            loss = difference(batch, weights).square().mean()
            gradients = iter(torch.autograd.grad(loss, learned, materialize_grads=True))
        for tensor in learned:
            tensor.requires_grad_(False)
        for rounding in roundings.values():
            rounding.step([next(gradients) for _ in rounding.learned], rate * (1 - step / steps))
        if (step + 1) % max(1, steps // VERDICTS) == 0 or step + 1 == steps:
            error = total_error()
            if error < best:
                best, kept = error, [tensor.clone() for tensor in learned]
    for tensor, value in zip(learned, kept, strict=True):
        tensor.copy_(value)
    return first, best


class SignRound(Walk):
    """The weights of a layer together: its outputs follow those of the uncompressed model."""

    options_class = SignRoundOptions

    def layer_weights(
        self, layer: Layer, modules: Mapping[str, nn.Module], inputs: StackInputs, exact: StackInputs | None
    ) -> dict[str, QuantizedWeight]:
        input_groups(modules, lambda: inputs.run(0))  # all are reached
        exact.advance()

        def states(batch: int, weights: Weights) -> Tensor:
            weights = {f"{key.removeprefix(f'{layer.name}.')}.weight": w.t() if isinstance(modules[key], Conv1D) else w
                       for key, w in weights.items()}  # fmt: skip
            return inputs.states(inputs.run(batch, weights), batch)

        return self._learned(
            modules, states, lambda b: inputs.states(exact.hidden[b], b), inputs.num_batches, layer.name
        )

    def outside_weights(self, modules: Mapping[str, nn.Module], rows: Iterable[Tensor]) -> dict[str, QuantizedWeight]:
        x, results = list(rows), {}
        for name, module in modules.items():
            W = matrix(module)

            def outputs(batch: int, weights: Weights, name: str = name) -> Tensor:
                return F.linear(x[batch], weights[name])

            results |= self._learned({name: module}, outputs, lambda b, W=W: F.linear(x[b], W), len(x), name)
        return results

    def _learned(
        self, modules: Mapping[str, nn.Module], outputs: Callable[[int, Weights], Tensor],
        targets: Callable[[int], Tensor], num_batches: int, name: str,
    ) -> dict[str, QuantizedWeight]:  # fmt: skip
        options, roundings = self.options, {}
        for key, module in modules.items():
            check_weight(matrix(module), key)
            roundings[key] = Rounding(matrix(module).detach(), self.schemes[key], range_method=self.range_method,
                                      learn_ranges=options.learn_ranges)  # fmt: skip

        def cast(batch: int, weights: Weights) -> Tensor:
            return outputs(batch, {key: w.to(modules[key].weight.dtype) for key, w in weights.items()})

        rate = 1 / options.steps if options.learning_rate is None else options.learning_rate
        errors = learn(roundings, cast, targets, num_batches, steps=options.steps, rate=rate, name=name)
        logger.info(f"{name}: mean squared error {errors[0]:.3g} to nearest, {errors[1]:.3g} as learned")
        results = {key: rounding.result() for key, rounding in roundings.items()}
        for key, module in modules.items():
            set_matrix(module, results[key].dequantize())
            self.progress.update()
        return results
