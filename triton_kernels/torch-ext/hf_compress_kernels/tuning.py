"""Tile configurations, as data: measured tables where there are any, rules otherwise. Nothing is benchmarked in a call.

A table is a JSON file: {"version": 1, "entries": [{"bits", "group_size", "M", "N", "K", "block_m", "block_n",
"num_warps", "num_stages", "split_k"}, ...]}, named `<op>.<device>.json` after the device's name or its architecture
(sm_80, gfx942). Files in `$HF_HOME/hf_compress/kernels` win over those shipped in `configs/`, a device's over its
architecture's. The entry of the same bits and M bucket that is nearest in (group size, N, K), on a log scale, is used.
"""

import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import torch

logger = logging.getLogger(__name__)

VERSION = 1
M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Bytes of shared memory that one program may use.
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SMALLEST_SHARED_MEMORY = 65536
# From this many rows on, dequantizing the weight once and calling the vendor's product is faster than the fused kernel.
DEQUANT_FROM = {"sm_80": 512, "sm_90": 512, "sm_100": 512}
DEQUANT_FROM_ELSEWHERE = 2048
# Share of stored weights above which a dense product beats the block-sparse one, by the shorter side of a block.
BSR_BREAK_EVEN = {16: 0.2, 32: 0.45, 64: 0.6, 128: 0.8}
BSR_BREAK_EVEN_HOPPER = {16: 0.1, 32: 0.2, 64: 0.35, 128: 0.5}  # dense tensor-core products gained more than caches did
BSR_DW_ROWS = 64  # rows of x in a step of the blocks' gradient


class Device(NamedTuple):
    """What the launchers ask of a device, read once."""

    name: str
    arch: str  # sm_80, ..., gfx942, or "interpreter"
    multiprocessors: int

    @property
    def uses_asm(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def has_tensor_cores(self) -> bool:
        """Whether Triton emits tensor-core instructions for 16-bit operands."""
        return not (self.arch.startswith("sm_") and int(self.arch[3:]) < 80)


class TileConfig(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 0  # 0: as `split_k` says


SMALLER = (TileConfig(16, 64, 4, 2), TileConfig(16, 64, 4, 1))  # one after the other, where shared memory runs out


@functools.lru_cache(None)
def device_of(index: Optional[int]) -> Device:
    """The CUDA or ROCm device number `index`; None is the interpreter on the CPU."""
    if index is None:
        return Device("interpreter", "interpreter", 4)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Device(properties.name.replace(" ", "_"), arch, properties.multi_processor_count)


def device_for(tensor: torch.Tensor) -> Device:
    return device_of(tensor.device.index if tensor.is_cuda else None)


def bucket(M: int) -> int:
    """The largest bucket that is at most M."""
    return max(b for b in M_BUCKETS if b <= max(1, M))


def rule(arch: str, bits: int, M: int) -> TileConfig:
    """The configuration of the fused low-bit product when no table has one.

    Settled with the static gate: no spills, asynchronous copies, three buffers and at least two programs to a
    multiprocessor while decoding; two buffers where three would leave one program.
    """
    if arch.startswith("gfx"):  # the smallest matrix instruction has 16 rows, and shared memory ends at 64 KB
        return TileConfig(16 if M <= 16 else 32 if M <= 32 else 64, 128, 4 if M <= 32 else 8, 2)
    wide = bits in (2, 3)  # tiles of 256 columns
    small = arch in ("sm_86", "sm_89") and (bits in (3, 8) or bits == 2 and M > 16)
    small = small or (arch == "sm_80" and bits == 3 and M > 16)
    if M <= 32:
        # At 3 bit a plane of 8 rows has two bytes for a thread, too few for an asynchronous copy.
        block_m = 32 if M > 16 else 16 if M > 8 or bits == 3 else 8
        return TileConfig(block_m, 128, 4, 3 if small else 4)
    if wide:
        return TileConfig(64, 128, 8, 3)
    if M <= 64:
        return TileConfig(64, 64 if bits == 8 else 128, 4, 3)
    return TileConfig(128, 128, 8, 2 if bits == 8 and arch in ("sm_86", "sm_89") else 3)


def linear_config(device: Device, bits: int, group_size: int, M: int, N: int, K: int) -> TileConfig:
    table = _table("wna16_linear", device.name, device.arch)
    candidates = table.get((bits, bucket(M)), [])
    if not candidates:
        return rule(device.arch, bits, M)
    here = {"group_size": group_size, "N": N, "K": K}
    nearest = min(candidates, key=lambda entry: sum(abs(math.log(entry[name] / here[name])) for name in _SIZES))
    return TileConfig(*(nearest[name] for name in TileConfig._fields))


def split_k(config: TileConfig, device: Device, M: int, N: int, num_kt: int) -> int:
    """Programs that share one tile of the result.

    The smallest power of two that gives two programs to every multiprocessor, but each keeps at least four steps over
    K, so that its pipeline fills; at most 2 from 33 rows on, and 1 from 65.
    """
    if config.split_k:
        return config.split_k
    if M > 64:
        return 1
    tiles = -(-M // config.block_m) * -(-N // config.block_n)
    most = min(2 if M > 32 else 64, num_kt // 4)
    split = 1
    while tiles * split < 2 * device.multiprocessors and 2 * split <= most:
        split *= 2
    return split


def dequant_from(device: Device) -> int:
    """The number of rows from which the dequantize-and-multiply path runs."""
    if not device.has_tensor_cores:
        return 0
    return DEQUANT_FROM.get(device.arch, DEQUANT_FROM_ELSEWHERE)


def bsr_break_even(device: Device, side: int) -> float:
    """The density above which `bsr_linear` multiplies densely."""
    return (BSR_BREAK_EVEN_HOPPER if device.arch in ("sm_90", "sm_100") else BSR_BREAK_EVEN)[side]


def bsr_rule(device: Device, M: int, out_side: int, in_side: int) -> TileConfig:
    """Rows of x for a program of the block-sparse product, and its warps and stages; block_n is the block's side."""
    block_m = 128 if M > 64 else 64 if M > 32 else 32 if M > 16 else 16
    if device.arch.startswith("gfx"):
        return TileConfig(min(block_m, 64), out_side, 4, 2)
    warps = 8 if block_m == 128 and out_side == 128 else 4
    stages = 5 if in_side <= 32 else 4 if in_side == 64 else 3
    return TileConfig(block_m, out_side, warps, stages)


def bsr_smaller(config: TileConfig) -> "List[TileConfig]":
    """`config`, then with fewer rows and stages, down to 16 and 1: for devices whose shared memory is small."""
    found = [config]
    while found[-1].num_stages > 1 or found[-1].block_m > 16:
        last = found[-1]
        if last.num_stages > 1:
            found.append(last._replace(num_stages=last.num_stages - 1))
        else:
            found.append(last._replace(block_m=last.block_m // 2))
    return found


def user_folder() -> Path:
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return Path(home).expanduser() / "hf_compress" / "kernels"


_SIZES = ("group_size", "N", "K")


@functools.lru_cache(None)
def _table(op: str, name: str, arch: str) -> Dict[tuple, List[dict]]:
    """(bits, M bucket) -> entries of the first file that exists."""
    shipped = Path(__file__).parent / "configs"
    for folder, device in [(f, d) for f in (user_folder(), shipped) for d in (name, arch)]:
        path = folder / f"{op}.{device}.json"
        if path.is_file():
            return read_table(path, arch)
    logger.debug("No table of %s for %s or %s: using the rules.", op, name, arch)
    return {}


def read_table(path: Path, arch: str) -> Dict[tuple, List[dict]]:
    """The entries of a table by (bits, M bucket). Raises ValueError for a table that this version cannot use."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"{path} is not a table of version {VERSION}. Delete it, or run `hf-compress tune` again.")
    table: Dict[tuple, List[dict]] = {}
    wanted = {"bits", "M", *_SIZES, *TileConfig._fields}
    for entry in content["entries"]:
        if set(entry) != wanted or not all(isinstance(v, int) and v >= 0 for v in entry.values()):
            raise ValueError(f"{path}: every entry needs the integers {sorted(wanted)}, got {entry}.")
        needed = shared_memory(TileConfig(*(entry[name] for name in TileConfig._fields)), entry["bits"])
        limit = SHARED_MEMORY.get(arch, SMALLEST_SHARED_MEMORY)
        if needed > limit:
            raise ValueError(f"{path}: {entry} needs {needed} bytes of shared memory, {arch} has {limit}.")
        table.setdefault((entry["bits"], bucket(entry["M"])), []).append(entry)
    return table


def shared_memory(config: TileConfig, bits: int) -> int:
    """Bytes that the pipeline of the low-bit product keeps in shared memory, estimated from its tiles."""
    tile_k = 256 if bits in (2, 3) else 128
    weights = config.block_n * tile_k * bits // 8
    return (config.num_stages - 1) * (weights + config.block_m * tile_k * 2 + config.block_n * 4)
