"""What was measured of one model: a plain record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_compress.measuring.timing import Spread

PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Measurement:
    """What a model costs. Speeds hold for this device, these threads, this dtype and this sequence length."""

    parameters: int  # weights as stored: zeros count, packed values count once each
    stored_bytes: int  # weight files and config.json; no tokenizer
    bits_per_weight: float  # all stored tensors (scales, zero points and indices too) over `parameters`
    sparsity: dict[str, float]  # share of zeros by kind, see `counting.sparsity`; empty where nobody looked
    multiply_adds: int  # of one example of `sequence_length` tokens
    latency_ms: Spread  # of one forward of one example
    throughput: Spread  # examples a second in batches of 32
    peak_memory_bytes: int | None  # the model's tensors, and the most a forward of 32 examples holds beside them; None
    # in a runtime that keeps memory of its own
    sequence_length: int | None  # None for a model of pixels
    dtype: str
    device: str
    threads: int
    versions: dict[str, str]
    cpu_mode: str = "auto"  # what HF_COMPRESS_CPU asked of compressed layers
    routes: dict[str, int] = field(default_factory=dict)  # how many packed layers each way of multiplying ran
    identity: str | None = None  # of the stored files, see `model_identity`: which model this is
    runtime: str = PYTORCH  # what ran it, with its version where it is not PyTorch
    decoding: Spread | None = None  # tokens a second that one example is written at, greedily; None for what does not

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Measurement":
        """What `dataclasses.asdict` made of one, and perhaps JSON after it."""
        found = {name: plain.get(name) for name in ("latency_ms", "throughput", "decoding")}
        spreads = {name: one and Spread(**{**one, "samples": tuple(one["samples"])}) for name, one in found.items()}
        return cls(**{**plain, **spreads})
