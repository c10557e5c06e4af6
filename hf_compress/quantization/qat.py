"""Quantization-aware training: a model whose weights and activations are fake-quantized while it trains.

The weights stay where they are and as precise as they are, so any `Trainer` trains such a model and a checkpoint of it
is an ordinary one. The grids belong to the trainer, which saves them beside the optimiser (see `training_state`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.model.anatomy import anatomy, is_readable, matrix, out_features
from hf_compress.model.classes import ModelT, made_class
from hf_compress.model.record import read_part
from hf_compress.model.unfinished import FORM, check_loaded, check_model, forms_of
from hf_compress.model.weights import check_writable
from hf_compress.quantization.fake_quantize import ActivationQuantizer, WeightQuantizer
from hf_compress.quantization.modules import choose_modules
from hf_compress.quantization.ternary import TernaryQuantizer, check_options
from hf_compress.surgery.transaction import Transaction
from hf_compress.training.callback import PieceCallback
from hf_compress.training.finish import finish
from hf_compress.training.pieces import Piece
from hf_compress.training.shards import is_sharded, whole
from hf_compress.training.state import STATE_NAME

logger = logging.getLogger(__name__)

WIDTHS = (8, 4, 3, 2)  # the way down when bits are lowered in stages


@dataclass
class Quantizers:
    """The form of a fake-quantized module (see `training.pieces`): it is stored packed, on the grid it trained with."""

    original_class: type
    weights: WeightQuantizer
    inputs: ActivationQuantizer | None  # None: inputs are left alone

    @property
    def column_unit(self) -> int:
        return 1 if self.weights.columns == self.weights.shape[1] else self.weights.columns

    @property
    def hears_all(self) -> bool:
        return self.inputs is not None and self.inputs.dynamic

    @property
    def is_idle(self) -> bool | None:
        return None if self.inputs is None else self.inputs.is_idle

    def check(self, name: str) -> None:
        if self.inputs is not None and not (self.inputs.dynamic or self.inputs.has_seen):
            raise ValueError(f"{name} has no activation range yet: train, or run some batches in train mode.")

    def select(self, transaction: Transaction, rows: Sequence[int] | None, columns: Sequence[int] | None) -> None:
        transaction.set(self, "weights", self.weights.select(rows, columns))

    def put_on(self, module: nn.Module) -> None:
        kinds = {nn.Linear: FakeQuantLinear, Conv1D: FakeQuantConv1D, nn.Embedding: FakeQuantEmbedding}
        kind = nn.Linear if issubclass(self.original_class, nn.Linear) else self.original_class
        # a subclass of nn.Embedding keeps its own forward, whose `super().forward` now looks up quantized rows
        module.__class__ = kinds.get(kind) or made_class(f"FakeQuant{kind.__name__}", kind, FakeQuantEmbedding)
        setattr(module, FORM, self)

    def take_off(self, module: nn.Module) -> None:
        module.__class__ = self.original_class
        delattr(module, FORM)

    def stored(self, module: nn.Module) -> nn.Module:
        limits = None if self.inputs is None else self.inputs.range()
        activation = {"activation_bits": 8, "activation_range": limits} if limits or self.hears_all else {}
        return self.weights.stored(module, **activation)


class FakeQuantized:
    """What the three kinds share. The quantizers are not registered: they are no part of the model's state."""

    @property
    def weight_quantizer(self) -> WeightQuantizer:
        return vars(self)[FORM].weights

    @property
    def input_quantizer(self) -> ActivationQuantizer | None:
        return vars(self)[FORM].inputs

    def fake_input(self, x: Tensor) -> Tensor:
        if self.input_quantizer is None:
            return x
        return self.input_quantizer.to(x.device).train(self.training)(x)

    def fake_weight(self) -> Tensor:
        return self._quantizer()(matrix(self))  # (N, K)

    def _quantizer(self) -> WeightQuantizer:
        return self.weight_quantizer.to(matrix(self).device).train(self.training)


class FakeQuantLinear(FakeQuantized, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fake_input(x), self.fake_weight(), self.bias)


class FakeQuantConv1D(FakeQuantized, Conv1D):
    forward = FakeQuantLinear.forward


class FakeQuantEmbedding(FakeQuantized, nn.Embedding):
    @property
    def weight(self) -> Tensor:
        """The table on its grid, for those that read it whole, as DeBERTa its relative positions.

        Between passes FSDP2, which has cut it, asks for the parameter itself under this name.
        """
        return matrix(self) if is_sharded(matrix(self)) else self.fake_weight()

    def forward(self, input: Tensor) -> Tensor:
        return self._quantizer().look_up(input, matrix(self), self.padding_idx)


def prepare_qat(
    model: ModelT,
    bits: int | Mapping[str, int] = 4,
    *,
    num_groups: int | str | None = "auto",
    group_size: int = -1,
    symmetric: bool = False,
    activation_bits: int | None = 8,
    dynamic_activations: bool = False,
    embedding_bits: int | None = 8,
    learned_steps: bool = False,
    grid: str = "uniform",
    rounded_share: float = 1.0,
    range_method: str = "mse",
    skip_modules: tuple[str, ...] = (),
) -> ModelT:
    """Make the model compute with quantized weights and inputs while it trains, in place. Returns the model.

    Args:
        bits: for all linear maps inside the layers, or {module name: bits}.
        num_groups: Q-BERT's groups, bundles of output rows that stay inside one head (at least so many for each weight,
            fewer where there are fewer rows); None for one group a row, "auto" for 128, or one a row with `group_size`.
        group_size: instead of bundles, groups of so many consecutive columns in each row.
        activation_bits: 8 quantizes the inputs of each linear map too, None leaves them alone.
        dynamic_activations: each token's own range instead of a running one.
        embedding_bits: of all embedding tables, one scale a row; None leaves them alone.
        learned_steps: scales are parameters (LSQ); else they are chosen anew from time to time by `range_method`.
        grid: "uniform", or "ternary", in 2 bits: zero and two learned values of each row or group of columns (TTQ, Zhu
            et al., 2017), stored as a codebook, which takes `activation_bits=None`.
        rounded_share: the share of the weights that each training pass rounds, drawn anew; below 1 the gradient of the
            others is exact (Quant-Noise, Fan et al., 2021). In evaluation and in the end all are rounded.

    Train it with a trainer that knows `TrainingState` (all of ours) and the callback `QuantizationAware`, then
    `finish` turns it into a packed model with the same logits. Raises ValueError for a model that is packed, stored in
    blocks, or prepared already.
    """
    if num_groups not in ("auto", None) and group_size != -1:
        raise ValueError(
            f"Weights share a scale in bundles of rows (num_groups={num_groups}) or in groups of columns "
            f"(group_size={group_size}), not in both: leave one of them out."
        )
    if num_groups not in ("auto", None) and (not isinstance(num_groups, int) or num_groups < 1):
        raise ValueError(f"num_groups is a number of bundles of rows, 1 or more, 'auto' or None, got {num_groups!r}.")
    if not 0 < rounded_share <= 1:
        raise ValueError(f"rounded_share is a share of the weights, above 0 and up to 1, got {rounded_share}.")
    if grid == "ternary":
        check_options(num_groups=num_groups not in ("auto", None), symmetric=symmetric, learned_steps=learned_steps,
                       activation_bits=activation_bits is not None, rounded_share=rounded_share != 1,
                       range_method=range_method != "mse")  # fmt: skip
    elif grid != "uniform":
        raise ValueError(f"grid must be 'uniform' or 'ternary', got {grid!r}; others are for `quantize`.")
    if num_groups == "auto":
        num_groups = 128 if group_size == -1 else None
    if activation_bits not in (None, 8):
        raise ValueError(f"activation_bits must be 8 or None, got {activation_bits}.")
    check_loaded(model, "prepare_qat")
    if any(isinstance(m, FakeQuantized) for m in model.modules()):
        raise ValueError("The model is prepared already.")
    layers = anatomy(model).layers if is_readable(model) else ()
    if layers:
        check_writable(anatomy(model), "prepare_qat")
    heads = {m: a.head_dim for layer in layers for a in layer.attentions for m in (a.query, a.key, a.value)}
    chosen = choose_modules(model, bits, embedding_bits=embedding_bits, skip_modules=skip_modules)
    for name, width in chosen.items() if grid == "ternary" else ():
        if width != 2 and not isinstance(model.get_submodule(name), nn.Embedding):
            raise ValueError(f"{name}: a ternary grid is stored in 2 bits a weight, got bits={width}.")
    for name, width in chosen.items():
        module = model.get_submodule(name)
        weight = matrix(module).detach()
        if isinstance(module, nn.Embedding):
            if tied := [n for n, source in model.all_tied_weights_keys.items() if source == f"{name}.weight"]:
                raise ValueError(f"{name} is tied to {tied[0]}, which would not be rounded: use embedding_bits=None.")
            layout = {"range_method": "minmax", "symmetric": symmetric}
        elif grid == "ternary":
            layout = {"columns": group_size, "learned": True}
        else:
            rows = 1 if num_groups is None else bundle_size(module, num_groups, heads.get(module))
            layout = dict(rows=rows, columns=group_size, symmetric=symmetric, range_method=range_method,
                          learned=learned_steps)  # fmt: skip
        is_ternary = grid == "ternary" and not isinstance(module, nn.Embedding)
        kind = TernaryQuantizer if is_ternary else WeightQuantizer
        quantizer = kind(weight, width, rounded_share=rounded_share, **layout)
        is_quiet = activation_bits is None or isinstance(module, nn.Embedding)
        inputs = None if is_quiet else ActivationQuantizer(dynamic=dynamic_activations, name=name)
        Quantizers(type(module), quantizer, inputs).put_on(module)
    return model


def bundle_size(module: nn.Module, num_groups: int, head_dim: int | None) -> int:
    """Rows that share a scale: as many as leave `num_groups` groups and divide the rows, those of one head if given."""
    rows = out_features(module)
    unit = rows if head_dim is None else head_dim
    most = max(1, rows // num_groups)
    return max(size for size in range(1, most + 1) if unit % size == 0)


def fake_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantized]]:
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantized):
            yield name, module


def pack_qat(model: ModelT) -> ModelT:
    """`finish` of a model made by `prepare_qat`; one that is finished is returned as it is."""
    check_model(model, "pack_qat")
    if not (forms_of(model) or read_part(model.config, "bits")):
        raise ValueError("The model was not prepared with `prepare_qat`.")
    return finish(model)


class QuantizationAware(PieceCallback):
    """Keeps the grids of a prepared model up to date in any of our trainers.

    refresh_steps    choose the grids anew after so many steps, where step sizes are not learned
    start_bits       begin with so many bits and go down through 8, 4, 3 and 2 to each module's own; with
                     `load_best_model_at_end` only what was evaluated at the last of them counts
    lowering_ratio   share of the training that this takes
    """

    name = "quantization_aware"

    def __init__(self, *, refresh_steps: int = 100, start_bits: int | None = None, lowering_ratio: float = 0.3):
        if refresh_steps < 1 or not 0 < lowering_ratio <= 1 or start_bits not in (None, *WIDTHS):
            raise ValueError(
                f"refresh_steps must be positive, lowering_ratio in (0, 1] and start_bits one of {WIDTHS} or None, "
                f"got {refresh_steps}, {lowering_ratio} and {start_bits}."
            )
        self.refresh_steps, self.start_bits, self.lowering_ratio = refresh_steps, start_bits, lowering_ratio
        self.targets: dict[str, int] = {}
        self._max_steps = 0

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        if not any(fake_modules(model)):
            raise ValueError("QuantizationAware needs a model made by `prepare_qat`, and not finished yet.")
        ternary = [n for n, module in fake_modules(model) if isinstance(module.weight_quantizer, TernaryQuantizer)]
        if ternary and (self.start_bits is not None or any(piece.block_size for piece in pieces)):
            raise ValueError(
                f"{ternary[0]} has a ternary grid: it has 2 bits from the start, and is not stored in blocks. Leave "
                "out start_bits and BlockPruning, or take grid='uniform'."
            )

    def is_done(self, step: int) -> bool:
        """The bits that a model was trained with after `step` steps are those that the last one began with."""
        widths = {self._width(target, max(0, step - 1), self._max_steps) == target for target in self.targets.values()}
        return widths == {True}

    def training_state_entries(self, model: nn.Module) -> dict[str, nn.Module]:
        entries = {}
        for name, module in ((n.replace(".", "__"), m) for n, m in fake_modules(model)):
            entries[f"{name}__weight_grid"] = module.weight_quantizer
            if module.input_quantizer is not None:
                entries[f"{name}__input_range"] = module.input_quantizer
        return entries

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model)
        found, self._max_steps = dict(fake_modules(model)), state.max_steps
        if any(m.weight_quantizer.learned for m in found.values()) and not hasattr(model, STATE_NAME):
            raise ValueError("Learned step sizes need a trainer with TrainingState: use one of hf_compress.")
        self.targets = self.targets or {name: module.weight_quantizer.bits for name, module in found.items()}
        for name, module in found.items():
            width = self._width(self.targets[name], max(0, state.global_step - 1), state.max_steps)
            if width != module.weight_quantizer.bits and state.global_step == 0:
                module.weight_quantizer.refresh(whole(matrix(module)), width)
            module.weight_quantizer.bits = width  # resumed: the grid of the step before came with the checkpoint
            if module.input_quantizer is not None:
                module.input_quantizer.is_shared = dist.is_initialized()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        super().on_step_begin(args, state, control)  # what more bits reached is no measure for fewer
        for name, module in fake_modules(model):
            quantizer = module.weight_quantizer
            width = self._width(self.targets[name], state.global_step, state.max_steps)
            is_due = state.global_step % self.refresh_steps == 0 and not quantizer.learned
            if is_due or width != quantizer.bits:
                quantizer.refresh(whole(matrix(module)), width)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        super().on_train_end(args, state, control, model=model)
        for _, module in fake_modules(model):
            if module.input_quantizer is not None:
                module.input_quantizer.is_shared = False
        for name, module in fake_modules(model):
            if (bits := module.weight_quantizer.bits) != self.targets[name]:
                logger.warning(f"The training ended early: {name} has {bits} bits instead of {self.targets[name]}.")
                break
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and hasattr(model, STATE_NAME):
            return  # the grids came with the best checkpoint
        for _, module in fake_modules(model):
            if not module.weight_quantizer.learned:
                module.weight_quantizer.refresh(whole(matrix(module)))

    def _width(self, target: int, step: int, max_steps: int) -> int:
        steps = [width for width in WIDTHS if target <= width <= (self.start_bits or target)]
        progress = step / max(1, max_steps) / self.lowering_ratio
        return target if progress >= 1 or len(steps) < 2 else steps[int(progress * len(steps))]
