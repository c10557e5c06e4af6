"""Through a model layer after layer, each seeing what the quantized layers before it hand on.

What one layer's weights become is the method's: `GPTQ` and `SignRound` are walks.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.checkpoint.offloaded import bring_in, check_offloaded
from hf_compress.layers.scheme import WeightScheme
from hf_compress.model.anatomy import Layer, Stack, anatomy, in_features, is_readable
from hf_compress.model.calibration import (
    StackInputs,
    capture_stack_inputs,
    input_groups,
    inputs_of,
    run_model,
    text_mask,
    token_rows,
    working_folder,
)
from hf_compress.model.precision import fast_matmul
from hf_compress.quantization.finished import FinishedLayers
from hf_compress.quantization.grids import QuantizedWeight
from hf_compress.quantization.modules import install, is_linear, set_matrix
from hf_compress.training.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockOptions:
    """How a walk works, whatever the method.

    batch_size         rows run at once
    offload            where the layer's inputs wait: "cpu" or "disk"
    resume_dir         finished layers are kept here; a run that was cut off goes on after the last of them
    exact_products     multiply in float32 where the processor could multiply in bfloat16 (several times slower)
    """

    batch_size: int = 8
    offload: str = "cpu"
    resume_dir: str | None = None
    exact_products: bool = False

    def __post_init__(self):
        if self.offload not in ("cpu", "disk"):
            raise ValueError(f"offload must be 'cpu' or 'disk', got {self.offload!r}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}.")

    @property
    def stores_g_idx(self) -> bool:
        return False

    @property
    def is_split(self) -> bool:
        """Whether each rank passes its own part of the calibration."""
        return False


class Walk:
    """One pass of a method over a model: the options, the data, and where the finished layers are kept.

    Changes `model`: `run` replaces the linear modules named in `schemes` by packed ones. `batches` are
    `calibration_batches`.
    """

    options_class: type[BlockOptions] = BlockOptions
    needs_exact = True  # whether a layer is told what it would get in the uncompressed model

    def __init__(self, model: PreTrainedModel, schemes: Mapping[str, WeightScheme], batches: Sequence[Mapping],
                 options: BlockOptions, *, range_method: str = "mse"):  # fmt: skip
        self.model, self.schemes, self.batches, self.options = model, schemes, batches, options
        self.range_method, self.finished, self.folder = range_method, None, None
        _check_amount(model, schemes, batches, options.is_split)
        check_offloaded(model)

    # What a method does

    def layer_weights(
        self, layer: Layer, modules: Mapping[str, nn.Module], inputs: StackInputs, exact: StackInputs | None
    ) -> dict[str, QuantizedWeight]:
        """What `modules` of a layer become; changes them so that they compute with it, and turns `exact` to the next.

        inputs  of the layer, as the quantized layers before it hand on
        exact   the same of the uncompressed model; None without `needs_exact`
        """
        raise NotImplementedError

    def outside_weights(self, modules: Mapping[str, nn.Module], rows: Iterable[Tensor]) -> dict[str, QuantizedWeight]:
        """What `modules` outside the layers become, which all get the inputs `rows`, each (tokens, K)."""
        raise NotImplementedError

    # The way through the model

    def run(self) -> None:
        options, was_training = self.options, self.model.training
        self.model.eval()
        self.progress = progress_bar(total=len(self.schemes), desc="Quantizing", unit="module")
        matmul = fast_matmul(enabled=not options.exact_products)
        try:
            with self.progress, matmul, working_folder(options.offload == "disk") as self.folder, torch.no_grad():
                if options.resume_dir is not None:
                    where = ("offload", "resume_dir", "split_over_ranks")
                    settings = {name: value for name, value in asdict(options).items() if name not in where}
                    settings |= {"range_method": self.range_method, "method": type(self).__name__}
                    self.finished = FinishedLayers(
                        Path(options.resume_dir), self.model, self.schemes, self.batches, settings
                    )
                self._layers()
                self._modules_outside_layers()
        finally:
            self.model.train(was_training)

    def _layers(self) -> None:
        if not is_readable(self.model):
            logger.warning(
                f"{type(self.model).__name__} cannot be read layer by layer: each module is quantized by itself, after "
                "passes of the whole model, which takes longer."
            )
            return
        stacks = [s for s in anatomy(self.model).stacks if any(self._inside(layer) for layer in s.layers)]
        exact = [self._capture(stack, f"exact{i}") if self.needs_exact else None for i, stack in enumerate(stacks)]
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
        results = {} if not modules else self.finished.load(layer.name) if self.finished is not None else None
        if results is None:
            results = self.layer_weights(layer, modules, inputs, exact)
            if self.finished is not None:
                self.finished.save(layer.name, results)
        else:
            if exact is not None:
                exact.advance()
            for name, result in results.items():
                set_matrix(modules[name], result.dequantize())
                self.progress.update()
        if not is_last:  # whatever follows runs the whole model
            inputs.advance()
        for name, result in results.items():
            install(self.model, name, result, self.schemes[name])

    def _modules_outside_layers(self) -> None:
        """Poolers, classifiers and heads: they see what the finished layers of the whole model hand on."""
        modules = {name: m for name in self.schemes if is_linear(m := self.model.get_submodule(name))}
        if not modules:
            return
        groups, counts = input_groups(modules, lambda: run_model(self.model, self.batches[0]))
        for first, *others in groups:
            rows = self._rows_outside(first, modules[first], counts)
            for name, result in self.outside_weights({n: modules[n] for n in (first, *others)}, rows).items():
                install(self.model, name, result, self.schemes[name])

    def _rows_outside(self, name: str, module: nn.Module, counts: Mapping[str, int]) -> Iterable[Tensor]:
        is_decoder = self.model.config.is_encoder_decoder  # what is outside comes after it
        for batch in self.batches:
            for x in inputs_of({name: module}, lambda b=batch: run_model(self.model, b), counts)[name]:
                yield token_rows(x, text_mask(batch, is_decoder=is_decoder))


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
