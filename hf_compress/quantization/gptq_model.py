"""GPTQ through a whole model: the Hessian of each weight is made of what reaches it once those before are quantized."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.model.anatomy import Layer
from hf_compress.model.calibration import (
    HiddenStates,
    InputMoments,
    StackInputs,
    input_groups,
    input_hooks,
    inputs_of,
)
from hf_compress.quantization.block_by_block import BlockOptions, Walk
from hf_compress.quantization.gptq import DAMP_PERCENT, output_error, quantize_weight
from hf_compress.quantization.grids import QuantizedWeight, check_weight
from hf_compress.quantization.modules import matrix, set_matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQOptions(BlockOptions):
    """How `quantize(method="gptq")` works, beside the options of any walk.

    desc_act           visit the columns by falling Hessian diagonal (act-order) and store `g_idx`
    static_groups      with desc_act: groups stay neighbouring columns, so nothing more is stored
    true_sequential    inside a layer, let later projections see the quantized earlier ones
    match_exact        how far to aim at the outputs of the uncompressed model instead of those of the weight on what
                       the quantized layers before hand on: 0 not at all, 1 fully, which fits the calibration text best
                       and other text less (Li et al., "GPTAQ", 2025, solved here in closed form)
    shrinkage          share by which the correlations between inputs are taken to be smaller than they were on the
                       calibration text, so that less is built on what may be peculiar to it
    refinements        rounds of refitting scales and coordinate descent after each weight
    damp_percent       share of the mean Hessian diagonal added to it
    split_over_ranks   each rank passes its own part of the calibration, and all get the model made from the whole of it
    """

    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    match_exact: float = 0.5
    shrinkage: float = 0.2
    refinements: int = 2
    damp_percent: float = DAMP_PERCENT
    split_over_ranks: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.damp_percent <= 1:
            raise ValueError(
                f"damp_percent is a share of the mean diagonal, above 0 and up to 1, got {self.damp_percent}."
            )
        if not 0 <= self.match_exact <= 1 or not 0 <= self.shrinkage < 1:
            raise ValueError(
                f"match_exact and shrinkage are shares from 0 to 1, got {self.match_exact} and {self.shrinkage}."
            )
        if self.refinements < 0:
            raise ValueError(f"refinements must be 0 or more, got {self.refinements}.")
        if self.split_over_ranks and (self.resume_dir is not None or not dist.is_initialized()):
            raise ValueError(
                "split_over_ranks needs several processes under torch.distributed, and no resume_dir: got "
                f"resume_dir={self.resume_dir!r}, distributed={dist.is_initialized()}."
            )

    @property
    def stores_g_idx(self) -> bool:
        return self.desc_act and not self.static_groups

    @property
    def is_split(self) -> bool:
        return self.split_over_ranks


class GPTQ(Walk):
    """Each weight in turn, its Hessian made of what the quantized ones before it hand on."""

    options_class = GPTQOptions

    @property
    def needs_exact(self) -> bool:
        return self.options.match_exact > 0

    def layer_weights(
        self, layer: Layer, modules: Mapping[str, nn.Module], inputs: StackInputs, exact: StackInputs | None
    ) -> dict[str, QuantizedWeight]:
        groups, counts = input_groups(modules, lambda: inputs.run(0))
        firsts, results = {group[0]: modules[group[0]] for group in groups}, {}
        wanted = self._run_exact(firsts, exact, counts) if exact is not None else None
        for stage in [[group] for group in groups] if self.options.true_sequential else [groups]:
            moments = self._moments({name: firsts[name] for name, *_ in stage}, inputs, wanted, counts)
            for group in stage:
                results |= self._weights({name: modules[name] for name in group}, moments[group[0]])
        return results

    def outside_weights(self, modules: Mapping[str, nn.Module], rows: Iterable[Tensor]) -> dict[str, QuantizedWeight]:
        moments = InputMoments()
        for x in rows:
            moments.add(x)
        self._share([moments])
        return self._weights(modules, moments)

    def _run_exact(
        self, modules: Mapping[str, nn.Module], exact: StackInputs, counts: Mapping[str, int]
    ) -> Callable[[str, int, int], Tensor]:
        """Run the layer as it still is on its exact inputs; returns what `modules` got, by name, batch and call."""
        kept, numbers = HiddenStates(exact.hidden.folder), {name: i for i, name in enumerate(modules)}
        dtype = None if self.options.exact_products else torch.bfloat16  # what the products will round to anyway
        for batch in range(exact.num_batches):
            seen = {name: [] for name in modules}
            with input_hooks(modules, lambda name, x, seen=seen: seen[name].append(x)):
                exact.hidden[batch] = exact.run(batch)
            for name, number in numbers.items():  # numbered: the files of the layer before are overwritten
                for call in range(counts[name]):
                    kept[f"{number}.{batch}.{call}"] = seen[name][call].to(dtype)
        exact.index += 1
        return lambda name, batch, call: kept[f"{numbers[name]}.{batch}.{call}"]

    def _moments(
        self,
        modules: Mapping[str, nn.Module],
        inputs: StackInputs,
        wanted: Callable[[str, int, int], Tensor] | None,
        counts: Mapping[str, int],
    ) -> dict[str, InputMoments]:
        moments = {name: InputMoments() for name in modules}
        for batch in range(inputs.num_batches):
            for name, calls in inputs_of(modules, lambda b=batch: inputs.run(b), counts).items():
                for call, x in enumerate(calls):
                    exact = None if wanted is None else wanted(name, batch, call).to(x.device)
                    rows = [None if y is None else inputs.tokens(modules[name], y, batch) for y in (x, exact)]
                    moments[name].add(*rows)
        self._share(moments.values())
        return moments

    def _share(self, moments: Iterable[InputMoments]) -> None:
        for one in moments if self.options.split_over_ranks else ():
            one.sum_over_ranks()

    def _weights(self, modules: Mapping[str, nn.Module], moments: InputMoments) -> dict[str, QuantizedWeight]:
        """What modules with the same inputs become. Rows are independent: those of one scheme go as one weight."""
        H = moments.hessian()
        if not H.isfinite().all():
            raise ValueError(
                f"The inputs of {', '.join(modules)} were NaN or infinite during calibration. Check the model on this "
                "data."
            )
        H, cross = shrink(H, H, self.options.shrinkage), moments.cross_hessian()
        if cross is not None:
            cross = shrink(cross, H, self.options.shrinkage)
        alike: dict[WeightScheme, list[str]] = {}
        for name, module in modules.items():
            check_weight(matrix(module), name)
            alike.setdefault(self.schemes[name], []).append(name)
        results = {}
        for scheme, names in alike.items():
            W = [matrix(modules[name]).float() for name in names]
            whole = self._quantized(", ".join(names), torch.cat(W), H, cross, scheme, moments.num_samples)
            results |= zip(names, whole.split([len(rows) for rows in W]), strict=True)
        for name, module in modules.items():
            set_matrix(module, results[name].dequantize())
            self.progress.update()
        return results

    def _quantized(self, name: str, W: Tensor, H: Tensor, cross: Tensor | None, scheme: WeightScheme,
                   num_samples: int) -> QuantizedWeight:  # fmt: skip
        options, target = self.options, W
        if cross is not None:
            target = torch.lerp(W, matching_weight(W, H, cross, options.damp_percent), options.match_exact)
        result = quantize_weight(
            target,
            H,
            scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            range_method=self.range_method,
            desc_act=options.desc_act,
            static_groups=options.static_groups,
            damp_percent=options.damp_percent,
            refinements=options.refinements,
            scale_dtype=SCALE_DTYPES[scheme.scale_dtype],
            name=name,
            num_samples=num_samples,
        )
        if logger.isEnabledFor(logging.INFO):
            error = output_error(target, result.dequantize(), H)
            logger.info(f"{name}: {scheme.bits} bits, output error {error:.2e} of the energy")
        return result


def shrink(moments: Tensor, hessian: Tensor, share: float) -> Tensor:
    """`moments` (K, K) drawn towards the diagonal of `hessian`, as if each input varied on its own."""
    return torch.lerp(moments, torch.diag(hessian.diagonal()), share)


def matching_weight(W: Tensor, H: Tensor, cross: Tensor, damp_percent: float) -> Tensor:
    """The weight V (N, K) that minimises ||W X_exact - V X||^2 + damp ||V - W||^2.

    H is 2 X X^T and cross 2 X_exact X^T, both (K, K), on the same calibration tokens.
    For any quantized Q the distance to the exact outputs is ||(V - Q) X||^2 plus a constant: quantizing V instead of W
    makes this layer repair what the layers before it lost.
    """
    damp = damp_percent * H.diagonal().mean().double()
    damped = H.double() + damp * torch.eye(len(H), dtype=torch.double, device=H.device)
    right = W.double() @ cross.double() + damp * W.double()
    lower, info = torch.linalg.cholesky_ex(damped)
    if info:  # singular: `inverse_cholesky` damps it more or says whose it is
        return W
    return torch.cholesky_solve(right.t(), lower).t().to(W.dtype)
