"""How one weight is stored in few bits: the entry of a module in the `bits` part of the record."""

import math
from dataclasses import asdict, dataclass, fields

import torch

BITS = (2, 3, 4, 8)  # and 1 for a codebook of two levels
LARGEST_INPUT = 2.0**30
SMALLEST_RANGE = 2.0**-118  # its 255th part is a float32 that divides well
MOST_STAGES = 16
SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def check_bits(bits: int) -> None:
    if bits not in BITS or not isinstance(bits, int):
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}.")


def check_activation_range(low: float, high: float) -> None:
    """Raise ValueError for a range that inputs of 8 bits cannot have: it must hold zero, have a width and have ends.

    Beyond LARGEST_INPUT two neighbours of the 256 values lie four millions apart: all inputs of a model would be one.
    """
    is_range = low <= 0 <= high and low < high and math.isfinite(low) and math.isfinite(high)
    if not is_range or max(-low, high) > LARGEST_INPUT or high - low < SMALLEST_RANGE:
        raise ValueError(
            f"The range of a layer's 8-bit inputs must hold zero, reach no further than {LARGEST_INPUT:g} and be at "
            f"least {SMALLEST_RANGE:.1e} wide, got {low!r} to {high!r}."
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class WeightScheme:
    """w ~ scale * (q - zero_point), q in [0, 2^bits - 1], a scale and zero point for each row and group of columns."""

    bits: int
    group_size: int = -1  # consecutive weights along K that share a scale; -1 means the whole row
    symmetric: bool = False  # the zero point is 2^(bits - 1) everywhere and not stored
    desc_act: bool = False  # the columns of a group are not neighbours: `g_idx` is stored
    scale_dtype: str = "float16"
    num_levels: int | None = None  # a codebook instead of a uniform grid: stored levels for each row and group
    parts: int | None = None  # of a table: a row is so many sub-vectors, each an index into centroids,
    stages: int = 1  # or the sum of so many
    activation_bits: int | None = None  # 8: the layer's inputs are quantized too
    activation_range: tuple[float, float] | None = None  # calibrated; None: each token's own range, when it comes

    def __post_init__(self):
        if (self.bits, self.num_levels) != (1, 2) or isinstance(self.bits, bool):
            check_bits(self.bits)
        if not _is_whole(self.group_size) or (self.group_size < 1 and self.group_size != -1):
            raise ValueError(f"group_size must be a positive whole number or -1, got {self.group_size!r}.")
        if not isinstance(self.symmetric, bool) or not isinstance(self.desc_act, bool):
            raise ValueError(
                f"symmetric and desc_act must be true or false, got {self.symmetric!r} and {self.desc_act!r}."
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {sorted(SCALE_DTYPES)}, got {self.scale_dtype!r}.")
        if self.num_levels is not None:
            if not _is_whole(self.num_levels) or not 2 <= self.num_levels <= 2**self.bits:
                raise ValueError(
                    f"num_levels must lie in [2, {2**self.bits}] at {self.bits} bits, got {self.num_levels!r}."
                )
            if self.symmetric or self.desc_act or self.activation_bits is not None:
                raise ValueError("A codebook has no zero points, act-order or activation bits.")
        self._check_parts()
        if self.activation_bits not in (None, 8):
            raise ValueError(f"activation_bits must be 8 or None, got {self.activation_bits!r}.")
        if self.activation_range is not None:
            check_activation_range(*self.activation_range)
            if self.activation_bits is None:
                raise ValueError(f"activation_range {self.activation_range!r} comes with activation_bits, got None.")

    def _check_parts(self) -> None:
        if self.parts is None:
            if self.stages != 1 or isinstance(self.stages, bool):
                raise ValueError(f"stages come with parts, got stages={self.stages!r} without.")
            return
        are_whole = _is_whole(self.parts) and _is_whole(self.stages)
        if not are_whole or self.parts < 1 or not 1 <= self.stages <= MOST_STAGES:
            raise ValueError(
                f"parts must be a positive whole number and stages one up to {MOST_STAGES}, got {self.parts!r} and "
                f"{self.stages!r}."
            )
        if self.num_levels != 2**self.bits or self.group_size != -1:
            raise ValueError(
                f"Parts of {self.bits} bits have {2**self.bits} centroids and no groups, got num_levels="
                f"{self.num_levels!r} and group_size={self.group_size!r}."
            )

    def part_size(self, embedding_dim: int) -> int:
        """Columns of one of the parts. Raises ValueError where they do not divide the row."""
        if embedding_dim % self.parts:
            raise ValueError(f"parts must divide the columns of a table: got parts={self.parts} and {embedding_dim}.")
        return embedding_dim // self.parts

    def index_bits(self, in_features: int) -> float:
        """Stored bits of the integers alone, over weights."""
        return self.bits if self.parts is None else self.bits * self.parts * self.stages / in_features

    def num_groups(self, in_features: int) -> int:
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"group_size must divide in_features: got {self.group_size} and {in_features}.")
        return in_features // self.group_size

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits over weights, with scales, zero points and group index."""
        if self.parts is not None:
            centroids = self.stages * self.num_levels * in_features * SCALE_DTYPES[self.scale_dtype].itemsize * 8
            return self.index_bits(in_features) + centroids / (out_features * in_features)
        groups = self.num_groups(in_features)
        per_group = SCALE_DTYPES[self.scale_dtype].itemsize * 8 * (self.num_levels or 1)
        if not self.symmetric and self.num_levels is None:
            per_group += self.bits
        index = 32 * in_features if self.desc_act else 0
        return self.bits + (groups * out_features * per_group + index) / (out_features * in_features)

    def to_dict(self) -> dict:
        """JSON-plain, with only what differs from the defaults."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if f.name == "bits" or values[f.name] != f.default}

    @classmethod
    def from_dict(cls, values: dict, name: str) -> "WeightScheme":
        """Read an entry of a record; `name` is the module's, for the error."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or "bits" not in values or values.keys() - known:
            raise ValueError(f"The record of {name} must hold bits and any of {sorted(known)}, got {values!r}.")
        try:
            if values.get("activation_range") is not None:
                values = {**values, "activation_range": tuple(values["activation_range"])}
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The record of {name} is not valid: {error}") from error


def auto_group_size(in_features: int, most: int = 128) -> int:
    """The largest of 128, 64 and 32, up to `most`, that divides `in_features`, else -1."""
    return next((size for size in (128, 64, 32) if size <= most and in_features % size == 0), -1)
