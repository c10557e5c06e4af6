"""Quantization as stages: at once, or inside another training, which rounds as what is stored will be."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.model.precision import cast, check_dtype
from hf_compress.quantization.allocation import allocate_bits
from hf_compress.quantization.codebooks import CODEBOOKS, WIDTHS, num_codebook_levels
from hf_compress.quantization.gptq_model import GPTQOptions
from hf_compress.quantization.modules import is_linear
from hf_compress.quantization.qat import QuantizationAware, prepare_qat
from hf_compress.quantization.quantize import check_grid, quantize
from hf_compress.quantization.sensitivity import hessian_sensitivity
from hf_compress.quantization.signround import SignRoundOptions
from hf_compress.recipe.one_shot import Samples

DTYPE_HELP = "Of all that is not packed, and of the arithmetic: float32, bfloat16, float16; as it is."
SENSITIVITY_BATCH = 8
HEAD_BITS = 8  # of poolers and heads, where the bits of the layers are mixed
CALLBACK_OPTIONS = ("refresh_steps", "start_bits", "lowering_ratio")


@dataclass(frozen=True)
class RoundOptions:
    """Round the weights of all linear maps within the layers to few bits."""

    bits: int = field(default=8, metadata={"help": "2, 3, 4 or 8 bits for each weight."})
    average_bits: float | None = field(
        default=None, metadata={"help": "In place of bits: a mean, the sensitive modules at more, e.g. 3.5."}
    )
    group_size: int | str = field(
        default="auto", metadata={"help": "Weights that share a scale: auto, -1 for the whole row, or 32, 64, 128."}
    )
    symmetric: bool = field(default=False, metadata={"help": "Fix the zero point at mid-range."})
    embedding_bits: int | None = field(default=None, metadata={"help": "Bits of the embedding tables; none: float."})
    embedding_parts: int | None = field(
        default=None, metadata={"help": "Parts of a table's row, each an index of embedding_bits into centroids."}
    )
    embedding_stages: int = field(default=1, metadata={"help": "Centroids that add up to a part of a row."})
    activation_bits: int | None = field(default=None, metadata={"help": "8 rounds the inputs of each layer as well."})
    static_activations: bool = field(
        default=False, metadata={"help": "One range for the inputs of a layer, seen over calibration_examples."}
    )
    calibration_examples: int = field(
        default=128, metadata={"help": "Training rows for static_activations and weighted."}
    )
    heads_too: bool = field(default=False, metadata={"help": "Pack the pooler and the head of the task as well."})
    skip_modules: str | None = field(default=None, metadata={"help": "Regular expressions of names, with commas."})
    range_method: str = field(default="mse", metadata={"help": "mse, minmax, percentile, kl or aciq."})
    grid: str = field(
        default="uniform",
        metadata={"help": f"uniform, or levels of their own: {', '.join(CODEBOOKS)}; ternary in 2 bits, binary in 1."},
    )
    bias_correction: bool = field(default=False, metadata={"help": "Of such levels: keep a group's mean and spread."})
    weighted: bool = field(
        default=False, metadata={"help": "Of kmeans: weigh errors by the inputs of calibration_examples."}
    )
    scale_dtype: str = field(
        default="auto", metadata={"help": "float16, float32, or auto: float32 where float16 cannot hold the scales."}
    )
    dtype: str | None = field(default=None, metadata={"help": DTYPE_HELP})
    sensitivity_examples: int = field(default=64, metadata={"help": "Examples of the Hessian for average_bits."})
    sensitivity_method: str = field(
        default="fisher", metadata={"help": "fisher, trace, eigenvalue, divergence; for average_bits."}
    )

    method = "rtn"

    def __post_init__(self):
        check_dtype(self.dtype)
        check_grid(self.grid, self.method, symmetric=self.symmetric, activation_bits=self.activation_bits,
                   bias_correction=self.bias_correction)  # fmt: skip
        if self.grid != "uniform" and self.average_bits is None:
            num_codebook_levels(self.grid, self.bits, "the stage")
        if self.grid in WIDTHS and self.average_bits is not None:
            raise ValueError(f"a {self.grid} grid has one width: leave out average_bits, got {self.average_bits}.")
        if self.weighted and self.grid != "kmeans":
            raise ValueError(f"weighted is of grid=kmeans, got {self.grid}.")

    @property
    def needs_texts(self) -> bool:
        return self.method != "rtn" or self.average_bits is not None or self._calibrates

    @property
    def _calibrates(self) -> bool:
        return self.static_activations or self.weighted

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        options = {field.name: getattr(self, field.name) for field in fields(RoundOptions)}
        for name in ("bits", "average_bits", "skip_modules", "heads_too", "sensitivity_examples", "sensitivity_method",
                     "dtype", "calibration_examples", "weighted"):  # fmt: skip
            options.pop(name)
        skip = self.skip_modules.split(",") if self.skip_modules else []
        quantize(
            model, self.module_bits(model, samples), method=self.method, skip_modules=skip, **options,
            **self.extra(samples),
        )  # fmt: skip
        return cast(model, self.dtype), tokenizer

    def module_bits(self, model: PreTrainedModel, samples: Samples) -> int | dict[str, int]:
        if self.average_bits is None:
            return linear_maps(model, self.bits) if self.heads_too else self.bits
        loader = samples.loader(self.sensitivity_examples, SENSITIVITY_BATCH)
        sensitivity = hessian_sensitivity(model, loader, method=self.sensitivity_method)
        bits = allocate_bits(
            model, sensitivity, average_bits=self.average_bits, group_size=self.group_size, symmetric=self.symmetric
        )
        return {**linear_maps(model, HEAD_BITS), **bits} if self.heads_too else bits

    def extra(self, samples: Samples) -> dict[str, Any]:
        return {"calibration": samples.some(self.calibration_examples)} if self._calibrates else {}


def linear_maps(model: PreTrainedModel, bits: int) -> dict[str, int]:
    """Every linear map that is not tied to a table, heads included."""
    tied = {key.removesuffix(".weight") for key in model.all_tied_weights_keys}
    return {name: bits for name, module in model.named_modules() if is_linear(module) and name not in tied}


@dataclass(frozen=True)
class GPTQStageOptions(RoundOptions, GPTQOptions):
    """GPTQ: round column by column, the columns still to come make up for the error (Frantar et al., 2023)."""

    bits: int = field(default=4, metadata={"help": "2, 3, 4 or 8 bits for each weight."})
    calibration_examples: int = field(default=128, metadata={"help": "Training rows that the Hessians are made of."})

    method = "gptq"

    def __post_init__(self):
        RoundOptions.__post_init__(self)
        GPTQOptions.__post_init__(self)

    def extra(self, samples: Samples) -> dict[str, Any]:
        return calibrated(self, GPTQOptions, samples)


@dataclass(frozen=True)
class SignRoundStageOptions(RoundOptions, SignRoundOptions):
    """Learn layer by layer which way each weight is rounded, by signed gradients (Cheng et al., 2023)."""

    bits: int = field(default=4, metadata={"help": "2, 3, 4 or 8 bits for each weight."})
    calibration_examples: int = field(default=128, metadata={"help": "Training rows that the layers follow."})

    method = "signround"

    def __post_init__(self):
        RoundOptions.__post_init__(self)
        SignRoundOptions.__post_init__(self)

    def extra(self, samples: Samples) -> dict[str, Any]:
        return calibrated(self, SignRoundOptions, samples)


def calibrated(stage: Any, kind: type, samples: Samples) -> dict[str, Any]:
    """The options of `kind` that `stage` has, and its calibration."""
    options = {field.name: getattr(stage, field.name) for field in fields(kind)}
    return {**options, "calibration": samples.some(stage.calibration_examples)}


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


QUANTIZE = {"rtn": RoundOptions, "gptq": GPTQStageOptions, "signround": SignRoundStageOptions, "qat": QATOptions}
