"""Measure tile configurations of the low-bit product on the GPU at hand and store the best where calls look for them.

Never part of a call: `hf-compress tune` runs it. A table is written after every shape, so an interrupted run keeps what
it has; shapes that a table has already are measured again.
"""

import json
import logging
import time
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import torch

from . import tuning
from .tuning import VERSION, Device, TileConfig
from .wna16 import wna16_pack

logger = logging.getLogger(__name__)

MOST_CANDIDATES = 24
FREE_BYTES = 2 * 2**30
SECONDS_EACH = 2.0  # compile and measure one candidate: for the estimate that is logged


def candidates(device: Device, bits: int, M: int) -> List[TileConfig]:
    """At most 24 configurations worth measuring: the rule first, then its neighbours that fit into shared memory."""
    rule = tuning.rule(device.arch, bits, M)
    limit = tuning.SHARED_MEMORY.get(device.arch, tuning.SMALLEST_SHARED_MEMORY)
    found = [rule]
    for block_m in sorted({rule.block_m, max(16, rule.block_m // 2), min(128, rule.block_m * 2)}):
        for block_n in (64, 128):
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4):
                    for split_k in (0, 1):
                        config = TileConfig(block_m, block_n, num_warps, num_stages, split_k)
                        if config not in found and tuning.shared_memory(config, bits) <= limit:
                            found.append(config)
    # Nearest to the rule first: the rule was settled on compiled code, and time is limited.
    distance = lambda c: sum(a != b for a, b in zip(c, rule))  # noqa: E731
    return sorted(found, key=distance)[:MOST_CANDIDATES]


def time_on_gpu(config: TileConfig, bits: int, group_size: int, M: int, N: int, K: int) -> float:
    """Median microseconds of one product in float16, weights out of cache, in a CUDA graph."""
    from .wna16_launch import launch_linear

    ints = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, device="cuda")
    ones = torch.ones(-(-K // group_size), N, device="cuda")
    packed = wna16_pack(ints, ones * 0.01, ones, bits, group_size, torch.float16)
    x = torch.randn(M, K, dtype=torch.float16, device="cuda")
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    copies = [packed.qweight.clone() for _ in range(min(20, 1 + 4 * cache // (packed.qweight.numel() * 2)))]
    run = lambda q: launch_linear(x, packed._replace(qweight=q), None, config)  # noqa: E731
    run(copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(20):
            run(copies[i % len(copies)])
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 200)
    return sorted(times)[2]


def tune_linear(
    shapes: Iterable[Tuple[int, int]],
    bits: int = 4,
    group_size: int = 128,
    rows: Iterable[int] = (1, 8, 16, 32, 64, 128, 256),
    folder: Optional[Path] = None,
    device: Optional[Device] = None,
    time_config: Callable[..., float] = time_on_gpu,
) -> Path:
    """Measure every (N, K) of `shapes` for every M of `rows`; returns the table's path.

    folder       where the table goes, by default where calls look first
    device       by default CUDA device 0
    time_config  (config, bits, group_size, M, N, K) -> microseconds, or OutOfResources for what does not fit

    Raises RuntimeError without a GPU, or with less than 2 GiB of free memory on it.
    """
    if device is None:
        if not torch.cuda.is_available():
            raise RuntimeError("Tuning measures on a GPU, and there is none. Without a table the built-in rules apply.")
        free, _ = torch.cuda.mem_get_info()
        if free < FREE_BYTES:
            raise RuntimeError(
                f"Tuning needs 2 GiB of free GPU memory, got {free / 2**30:.1f} GiB. Stop other work on it."
            )
        device = tuning.device_of(0)
    folder = tuning.user_folder() if folder is None else folder
    path = folder / f"wna16_linear.{device.name}.json"
    work = [(M, N, K) for N, K in shapes for M in rows]
    logger.info("Tuning %d shapes, about %.0f minutes.", len(work), len(work) * MOST_CANDIDATES * SECONDS_EACH / 60)
    for done, (M, N, K) in enumerate(work, start=1):
        start = time.perf_counter()
        best, best_us = None, float("inf")
        for config in candidates(device, bits, M):
            try:
                microseconds = time_config(config, bits, group_size, M, N, K)
            except _out_of_resources() as error:
                logger.debug("%s does not fit: %s", config, error)
                continue
            if microseconds < best_us:
                best, best_us = config, microseconds
        if best is None:
            raise RuntimeError(f"No configuration runs for {bits} bit, M={M}, N={N}, K={K} on {device.name}.")
        where = {"bits": bits, "group_size": group_size, "M": tuning.bucket(M), "N": N, "K": K}
        _store(path, {**where, **best._asdict()})
        seconds = time.perf_counter() - start
        logger.info("%d/%d M=%d N=%d K=%d: %s, %.1f us (%.0f s)", done, len(work), M, N, K, best, best_us, seconds)
    tuning._table.cache_clear()
    return path


def _out_of_resources() -> type:
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _store(path: Path, entry: Dict[str, int]) -> None:
    """Add the entry to the table, in place of an earlier one of the same shape; the file is replaced at once."""
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []
    same = ("bits", "group_size", "M", "N", "K")
    entries = [e for e in entries if any(e[name] != entry[name] for name in same)] + [entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"version": VERSION, "entries": entries}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
