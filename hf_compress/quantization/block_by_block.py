"""GPTQ through a whole model: layer after layer, each seeing what the quantized layers before it hand on."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.model.anatomy import Layer, Stack, anatomy, in_features, is_readable
from hf_compress.model.calibration import (
    HiddenStates,
    InputMoments,
    StackInputs,
    capture_stack_inputs,
    input_groups,
    input_hooks,
    inputs_of,
    run_model,
    text_mask,
    token_rows,
    working_folder,
)
from hf_compress.model.precision import fast_matmul
from hf_compress.quantization.finished import FinishedLayers
from hf_compress.quantization.gptq import DAMP_PERCENT, QuantizedWeight, output_error, quantize_weight
from hf_compress.quantization.modules import install, is_linear, matrix, set_matrix
from hf_compress.quantization.offloaded import bring_in, check_offloaded
from hf_compress.training.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQOptions:
    """How `quantize(method="gptq")` works.

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
    batch_size         rows run at once
    offload            where the layer's inputs wait: "cpu" or "disk"
    resume_dir         finished layers are kept here; a run that was cut off goes on after the last of them
    split_over_ranks   each rank passes its own part of the calibration, and all get the model made from the whole of it
    exact_products     multiply in float32 where the processor could multiply in bfloat16 (several times slower)
    """

    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    match_exact: float = 0.5
    shrinkage: float = 0.2
    refinements: int = 2
    damp_percent: float = DAMP_PERCENT
    batch_size: int = 8
    offload: str = "cpu"
    resume_dir: str | None = None
    split_over_ranks: bool = False
    exact_products: bool = False

    def __post_init__(self):
        if self.offload not in ("cpu", "disk"):
            raise ValueError(f"offload must be 'cpu' or 'disk', got {self.offload!r}.")
        if not 0 < self.damp_percent <= 1:
            raise ValueError(
                f"damp_percent is a share of the mean diagonal, above 0 and up to 1, got {self.damp_percent}."
            )
        if not 0 <= self.match_exact <= 1 or not 0 <= self.shrinkage < 1:
            raise ValueError(
                f"match_exact and shrinkage are shares from 0 to 1, got {self.match_exact} and {self.shrinkage}."
            )
        if self.refinements < 0 or self.batch_size < 1:
            raise ValueError(f"refinements and batch_size must be positive, got {self.refinements}, {self.batch_size}.")
        if self.split_over_ranks and (self.resume_dir is not None or not dist.is_initialized()):
            raise ValueError(
                "split_over_ranks needs several processes under torch.distributed, and no resume_dir: got "
                f"resume_dir={self.resume_dir!r}, distributed={dist.is_initialized()}."
            )

    @property
    def stores_g_idx(self) -> bool:
        return self.desc_act and not self.static_groups


def quantize_block_by_block(
    model: PreTrainedModel,
    schemes: Mapping[str, WeightScheme],
    batches: Sequence[Mapping[str, Tensor]],
    options: GPTQOptions,
    *,
    range_method: str = "mse",
) -> None:
    """Replace the linear modules named in `schemes` by packed ones, in place. `batches` are `calibration_batches`."""
    _check_amount(model, schemes, batches, options.split_over_ranks)
    check_offloaded(model)
    was_training = model.training
    model.eval()
    progress = progress_bar(total=len(schemes), desc="Quantizing", unit="module")
    matmul = fast_matmul(enabled=not options.exact_products)
    try:
        with progress, matmul, working_folder(options.offload == "disk") as folder, torch.no_grad():
            run = _Run(model, schemes, batches, options, range_method, progress, folder)
            run.layers()
            run.modules_outside_layers()
    finally:
        model.train(was_training)


def _check_amount(
    model: PreTrainedModel, schemes: Mapping[str, WeightScheme], batches: Sequence[Mapping], is_split: bool
) -> None:
    if any("input_ids" not in batch for batch in batches):
        return
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    tokens = sum(int(mask.sum()) for mask in masks)
    if is_split:
        all_tokens = torch.tensor(tokens, device=next(model.parameters()).device)
        dist.all_reduce(all_tokens)
        tokens = int(all_tokens)
    widest = max(schemes, key=lambda name: in_features(model.get_submodule(name)))
    columns = in_features(model.get_submodule(widest))
    if tokens < columns:
        raise ValueError(
            f"calibration is too short: {tokens} tokens cannot tell the {columns} columns of {widest} apart. "
            f"Pass at least that many, better 128 rows of 512 tokens."
        )


class _Run:
    """One pass of GPTQ over a model: the options, the data, and where the finished layers are kept."""

    def __init__(self, model: PreTrainedModel, schemes: Mapping[str, WeightScheme], batches: Sequence[Mapping],
                 options: GPTQOptions, range_method: str, progress, folder: Path | None):  # fmt: skip
        self.model, self.schemes, self.batches, self.options = model, schemes, batches, options
        self.range_method, self.progress, self.folder = range_method, progress, folder
        self.finished = None
        if options.resume_dir is not None:
            settings = {
                k: v for k, v in asdict(options).items() if k not in ("offload", "resume_dir", "split_over_ranks")
            }
            settings["range_method"] = range_method
            self.finished = FinishedLayers(Path(options.resume_dir), model, schemes, batches, settings)

    def layers(self) -> None:
        if not is_readable(self.model):
            logger.warning(
                f"{type(self.model).__name__} cannot be read layer by layer: each module is quantized after passes of "
                "the whole model, which takes longer, and `match_exact` has no effect."
            )
            return
        stacks = [s for s in anatomy(self.model).stacks if any(self._inside(layer) for layer in s.layers)]
        exact = [
            self._capture(stack, f"exact{i}") if self.options.match_exact else None for i, stack in enumerate(stacks)
        ]
        for i, stack in enumerate(stacks):
            inputs = self._capture(stack, f"inputs{i}")
            last = max(index for index, layer in enumerate(stack.layers) if self._inside(layer))
            for layer in stack.layers[: last + 1]:
                self._layer(layer, inputs, exact[i], is_last=layer is stack.layers[last])

    def _capture(self, stack: Stack, name: str) -> StackInputs:
        folder = None if self.folder is None else self.folder / name
        if folder is not None:
            folder.mkdir()
        bring_in(stack.layers[0].module)
        return capture_stack_inputs(self.model, stack, self.batches, folder, fast=not self.options.exact_products)

    def _inside(self, layer: Layer) -> dict[str, nn.Module]:
        return {
            f"{layer.name}.{name}": module
            for name, module in layer.module.named_modules()
            if f"{layer.name}.{name}" in self.schemes
        }

    def _layer(self, layer: Layer, inputs: StackInputs, exact: StackInputs | None, *, is_last: bool) -> None:
        bring_in(layer.module)
        modules = self._inside(layer)
        done = self.finished.load(layer.name) if self.finished is not None else None
        groups, counts = input_groups(modules, lambda: inputs.run(0)) if modules and done is None else ([], {})
        firsts = {group[0]: modules[group[0]] for group in groups}
        wanted = self._run_exact(firsts, exact, counts) if exact is not None else None
        results = done or {}
        for name, result in results.items():
            set_matrix(modules[name], result.dequantize())
            self.progress.update()
        for stage in [[group] for group in groups] if self.options.true_sequential else [groups]:
            moments = self._moments({name: firsts[name] for name, *_ in stage}, inputs, wanted, counts)
            for group in stage:
                for name in group:
                    results[name] = self._weight(name, modules[name], moments[group[0]])
        if self.finished is not None and done is None:
            self.finished.save(layer.name, results)
        if not is_last:  # whatever follows runs the whole model
            inputs.advance()
        for name, result in results.items():
            install(self.model, name, result, self.schemes[name])

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

    def _weight(self, name: str, module: nn.Module, moments: InputMoments) -> QuantizedWeight:
        scheme, options = self.schemes[name], self.options
        W, H = matrix(module).float(), moments.hessian()
        if not H.isfinite().all():
            raise ValueError(
                f"The inputs of {name} were NaN or infinite during calibration. Check the model on this data."
            )
        H = shrink(H, H, options.shrinkage)
        target = W
        if moments.cross is not None:
            cross = shrink(moments.cross_hessian(), H, options.shrinkage)
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
            num_samples=moments.num_samples,
        )
        quantized = result.dequantize()
        logger.info(f"{name}: {scheme.bits} bits, output error {output_error(target, quantized, H):.2e} of the energy")
        set_matrix(module, quantized)
        self.progress.update()
        return result

    def modules_outside_layers(self) -> None:
        """Poolers, classifiers and heads: they see what the finished layers of the whole model hand on."""
        modules = {name: m for name in self.schemes if is_linear(m := self.model.get_submodule(name))}
        if not modules:
            return
        is_decoder = self.model.config.is_encoder_decoder  # what is outside comes after it
        groups, counts = input_groups(modules, lambda: run_model(self.model, self.batches[0]))
        for first, *others in groups:
            moments = InputMoments()
            for batch in self.batches:
                calls = inputs_of({first: modules[first]}, lambda b=batch: run_model(self.model, b), counts)
                for x in calls[first]:
                    moments.add(token_rows(x, text_mask(batch, is_decoder=is_decoder)))
            self._share([moments])
            for name in (first, *others):
                install(self.model, name, self._weight(name, modules[name], moments), self.schemes[name])


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
    V, info = torch.linalg.solve_ex(damped, right, left=False)
    return W if info else V.to(W.dtype)  # singular: `inverse_cholesky` damps it more or says whose it is
