"""Quantization-aware training inside another training: prepare, train, pack."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel

from hf_compress.model.precision import check_dtype
from hf_compress.quantization.qat import QuantizationAware, prepare_qat
from hf_compress.recipe.one_shot import DTYPE_HELP, linear_maps

CALLBACK_OPTIONS = ("refresh_steps", "start_bits", "lowering_ratio")


@dataclass
class QATOptions:
    """Train with weights and activations rounded as they will be stored; part of a `together:` stage."""

    bits: int = field(default=8, metadata={"help": "2, 3, 4 or 8 bits for each weight."})
    num_groups: int | None = field(default=None, metadata={"help": "Q-BERT's groups; none: one scale for each row."})
    group_size: int = field(default=-1, metadata={"help": "Columns of a row that share a scale; -1 for all."})
    symmetric: bool = field(default=False, metadata={"help": "Fix the zero point at mid-range."})
    activation_bits: int | None = field(default=8, metadata={"help": "8 rounds the inputs of each layer, none not."})
    dynamic_activations: bool = field(default=False, metadata={"help": "Each token's own range of activations."})
    embedding_bits: int | None = field(default=8, metadata={"help": "Bits of the embedding tables; none: float."})
    heads_too: bool = field(default=False, metadata={"help": "Pack the pooler and the head of the task as well."})
    learned_steps: bool = field(default=False, metadata={"help": "Learn the scales with the weights (LSQ)."})
    grid: str = field(default="uniform", metadata={"help": "uniform, or ternary: two learned values of a row (TTQ)."})
    rounded_share: float = field(default=1.0, metadata={"help": "Weights rounded in a pass; below 1: Quant-Noise."})
    range_method: str = field(default="mse", metadata={"help": "mse, minmax, percentile, kl or aciq."})
    refresh_steps: int = field(default=100, metadata={"help": "Steps between two searches of the weight ranges."})
    start_bits: int | None = field(default=None, metadata={"help": "Begin with so many bits and go down."})
    lowering_ratio: float = field(default=0.3, metadata={"help": "Share of the training that lowering takes."})
    dtype: str | None = field(default=None, metadata={"help": DTYPE_HELP})

    def __post_init__(self):
        self.callback()  # checks the values
        check_dtype(self.dtype)

    def _preparation(self) -> dict[str, Any]:
        left_out = (*CALLBACK_OPTIONS, "bits", "heads_too", "dtype")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        bits = linear_maps(model, self.bits) if self.heads_too else self.bits
        return prepare_qat(model, bits, **self._preparation())

    def callback(self) -> QuantizationAware:
        return QuantizationAware(**{name: getattr(self, name) for name in CALLBACK_OPTIONS})
