"""What the processor has, what the user asked for, and which engines the measured table names for them."""

import json
import os
import platform
from functools import cache
from pathlib import Path

import torch

VARIABLE = "HF_COMPRESS_CPU"
MODES = ("auto", "exact", "reference")
SMALLEST = 16384  # weights; below this a call costs more than it multiplies, and the plain path runs


def mode() -> str:
    """What HF_COMPRESS_CPU asks for. Raises ValueError for an unknown word."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {value!r}.")
    return value


def choose_route(weights: int, *, one_copy: bool) -> str | None:
    """The `route` of `packed_linear` for a layer of `weights` weights, or None for the plain path."""
    wanted = mode()
    if wanted == "reference" or weights < SMALLEST:
        return None
    if wanted == "exact":
        return "exact"
    return "one_copy" if one_copy else "auto"


@cache
def instructions() -> str:
    """The best of "amx", "avx512_bf16", "avx512_vnni", or "other": the rows of the table that apply."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return "other"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # what ATen's own kernels were dispatched to
        return "other"
    for name, has in (
        ("amx", torch.cpu._is_amx_tile_supported),
        ("avx512_bf16", torch.cpu._is_avx512_bf16_supported),
        ("avx512_vnni", torch.cpu._is_vnni_supported),
    ):
        if has():
            return name
    return "other"


@cache
def table() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("table.json").read_text(encoding="utf-8"))


def matching(rows: list[dict], tokens: int, weights: int, dtype: str = "") -> dict:
    """The first row for products of `tokens` rows with `weights` weights."""
    return next(
        row
        for row in rows
        if tokens <= row.get("most_tokens", tokens)
        and weights >= row.get("least_weights", 0)
        and dtype == row.get("dtype", dtype)
    )


@cache
def candidates(kind: str, tokens: int, weights: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of engines to try in turn for a matrix product of `tokens` rows with `weights` weights.

    kind  "low" (up to 4 bit), "eight" (8 bit in groups) or "eight_rows" (8 bit, one scale a row); "_one_copy" is added
          where no second copy of the weight is wanted
    """
    rows = table()["engines"][instructions()][kind]
    return tuple(matching(rows, tokens, weights, str(dtype).removeprefix("torch."))["engines"])


@cache
def densest(dtype: torch.dtype, side: int, tokens: int, weights: int) -> float:
    """The density up to which gathering beats the dense product, for blocks whose shorter side is `side`."""
    kinds = table()["block_sparse"]
    rows = kinds.get(instructions(), kinds["others"])[str(dtype).removeprefix("torch.")]
    return matching(rows[str(min(side, 64))], tokens, weights)["densest"]
