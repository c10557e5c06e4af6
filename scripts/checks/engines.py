"""Check every route of the compressed layers on this CPU: right to its bound, and never far slower than PyTorch.

    python scripts/checks/engines.py --short     # a minute: part of `make check`
    python scripts/checks/engines.py             # the table of docs/cpu.md

Each row is a layer against stock `F.linear` in float32 on the same matrix, in turns, one thread, processor time of the
thread: the time of the layer over stock's, and its error against the float64 product. As in a model, the weights do not
stay in the cache: each call takes the next of several copies. Every cap that the processor can
play runs in a process of its own (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY). It fails where a route takes more than
three times as long or breaks its bound. bfloat16 inputs add the rounding of the output.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_compress.layers.activations import round_per_token  # noqa: E402
from hf_compress.layers.block_sparse import BlockSparseLinear  # noqa: E402
from hf_compress.layers.low_rank import factors, make_low_rank  # noqa: E402
from hf_compress.layers.packed_linear import PackedLinear  # noqa: E402
from hf_compress.layers.scheme import WeightScheme  # noqa: E402
from hf_compress.measuring.measure import device_name  # noqa: E402
from hf_compress.quantization.grids import round_to_nearest  # noqa: E402

CAPS = {  # name: what oneDNN and ATen are held to, and the flag of `torch.cpu` of what that takes away
    "none": ({}, None),
    "AVX512_CORE_BF16": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "_is_amx_tile_supported"),
    "AVX512_CORE_VNNI": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "_is_avx512_bf16_supported"),
    "AVX512_CORE": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "_is_vnni_supported"),
    "AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "_is_avx512_supported"),
}
SHAPES = {
    "MiniLM": [(384, 384), (1536, 384), (384, 1536)],
    "BERT": [(768, 768), (3072, 768)],
    "SmolLM2": [(576, 576), (1536, 576)],
}
SCHEMES = {
    "8 bit rows, inputs rounded": WeightScheme(8, symmetric=True, activation_bits=8),
    "8 bit rows": WeightScheme(8, symmetric=True),
    "8 bit groups": WeightScheme(8, 64),
    "4 bit groups": WeightScheme(4, 64),
    "3 bit groups": WeightScheme(3, 64),
    "2 bit groups": WeightScheme(2, 32),
}
BOUNDS = {"float32": 4e-6, "float32 by oneDNN": 4e-6, "float32 per call": 4e-6, "stored blocks": 4e-6,
          "bfloat16": 5e-3, "bfloat16 per call": 8e-3, "8-bit integers": 2e-2, "4-bit kernel": 6e-3,
          "4-bit kernel twice": 6e-3, "8-bit kernel": 6e-3}  # fmt: skip
OUTPUT_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 4e-3}
CACHE_BYTES = 24 << 20  # more than the last level holds for one core
SLOWEST = 3.0  # times stock's time; twice that where the weight is dequantized in each call
SECONDS = {True: 0.006, False: 0.03}  # of each turn, short and long
TURNS = {True: 3, False: 7}


def packed(scheme: WeightScheme, weight: Tensor, *, decodes: bool) -> PackedLinear:
    linear = nn.Linear(*weight.shape[::-1])
    rounded = round_to_nearest(weight, scheme)
    layer = PackedLinear.like(linear, scheme).fill(rounded.q, rounded.scales, rounded.zero_points)
    layer.prepare(decodes=decodes)
    return layer.requires_grad_(False)


def block_sparse(weight: Tensor, side: int, density: float) -> BlockSparseLinear:
    linear = nn.Linear(*weight.shape[::-1])
    linear.weight.data = weight
    mask = torch.rand(-(-weight.shape[0] // side), -(-weight.shape[1] // side)) < density
    return BlockSparseLinear.from_dense(linear, mask, (side, side)).requires_grad_(False)


def low_rank(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1])
    table, projection = factors(weight, min(weight.shape) // 4)
    make_low_rank(linear, nn.Parameter(table), nn.Parameter(projection))
    return linear.requires_grad_(False)


def layers(shape: tuple[int, int]) -> Iterator[tuple[str, nn.Module]]:
    weight = torch.randn(shape) / shape[1] ** 0.5
    for name, scheme in SCHEMES.items():
        yield name, packed(scheme, weight, decodes=False)
        yield f"{name}, decoder", packed(scheme, weight, decodes=True)
    for side, density in ((16, 0.2), (32, 0.5), (32, 0.1)):
        yield f"blocks of {side}, {density:.0%} stored", block_sparse(weight, side, density)
    yield "a quarter of the rank", low_rank(weight)


def name_of_run(layer: nn.Module, tokens: int) -> str:
    if isinstance(layer, PackedLinear):
        run = layer.run.pick(tokens) if hasattr(layer.run, "pick") else layer.run
        return run.name
    return layer._made[2].name if isinstance(layer, BlockSparseLinear) else "float32"


def relative_error(layer: nn.Module, x: Tensor, y: Tensor) -> float:
    inputs = x
    if isinstance(layer, PackedLinear) and layer.scheme.activation_bits is not None:
        inputs = round_per_token(x.float())
    oracle = inputs.double() @ layer.weight.as_subclass(Tensor).double().t() + layer.bias.double()
    return float((y.double() - oracle).norm() / oracle.norm())


def copies(layer: nn.Module, dense: Tensor) -> tuple[list[nn.Module], list[Tensor]]:
    """Enough of both that one round of stock's weights leaves the cache; what runs a layer is made here."""
    count = -(-CACHE_BYTES // (dense.numel() * dense.element_size()))
    return [copy.deepcopy(layer) for _ in range(count)], [dense.clone() for _ in range(count)]


def next_of(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Calls them in a circle."""
    circle = itertools.cycle(calls)
    return lambda: next(circle)()


def in_turns(calls: list[Callable[[], object]], *, short: bool) -> list[float]:
    """Median over turns of the seconds that each call takes."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(TURNS[short]):
        for call, times in zip(calls, samples, strict=True):
            count, begin, spent = 0, time.thread_time(), 0.0
            while spent < SECONDS[short]:
                call()
                count, spent = count + 1, time.thread_time() - begin
            times.append(spent / count)
    return [statistics.median(times) for times in samples]


def most(runs: str) -> float:
    """What a route may take, of stock's time."""
    return SLOWEST * (2 if runs.endswith("per call") else 1)


def min_ratio(turns: list[Callable[[], object]], limit: float, *, short: bool) -> float:
    """Of ours over stock's; a figure that would fail is taken up to five times, since other work disturbs it."""
    ratios = []
    for _ in range(5):
        mine, stock = in_turns(turns, short=short)
        ratios.append(mine / stock)
        if ratios[-1] <= limit:
            break
    return min(ratios)


@torch.no_grad()
def check(shape: tuple[int, int], tokens: list[int], dtypes: list[torch.dtype], *, short: bool) -> Iterator[dict]:
    for name, layer in layers(shape):
        dense = layer.weight.as_subclass(Tensor).float().clone()
        ours, stocks = copies(layer, dense)
        for M, dtype in itertools.product(tokens, dtypes):
            if (short and M > 128) or ("rank" in name and dtype is torch.bfloat16):
                continue
            x = torch.randn(M, shape[1])
            inputs = x.to(dtype)
            y = layer(inputs)
            for one in ours:  # what runs it is made at its first call
                one(inputs)
            turns = [next_of([partial(one, inputs) for one in ours]),
                     next_of([partial(F.linear, x, one, layer.bias) for one in stocks])]  # fmt: skip
            ratio = min_ratio(turns, most(name_of_run(layer, M)), short=short)
            yield {"layer": name, "shape": shape, "tokens": M, "dtype": str(dtype).removeprefix("torch."),
                   "runs": name_of_run(layer, M), "ratio": ratio, "error": relative_error(layer, inputs, y),
                   "bound": BOUNDS[name_of_run(layer, M)] + OUTPUT_ROUNDING[dtype]}  # fmt: skip


def run_here(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = [1, 8, 128] if args.short else [1, 8, 128, 1024]
    dtypes = [torch.float32] if args.short else [torch.float32, torch.bfloat16]
    shapes = [(384, 384), (1536, 576)] if args.short else [shape for some in SHAPES.values() for shape in some]
    for shape in shapes:
        for row in check(shape, tokens, dtypes, short=args.short):
            print(json.dumps(row), flush=True)


def possible_caps() -> list[str]:
    """Caps that change something here: those that take away what the processor has."""
    return [name for name, (_, flag) in CAPS.items() if flag is None or getattr(torch.cpu, flag, bool)()]


def run_capped(cap: str, args: argparse.Namespace) -> list[dict]:
    command = [sys.executable, __file__, "--here", *(["--short"] if args.short else [])]
    environment = {**os.environ, **CAPS[cap][0]}
    environment.pop("HF_COMPRESS_CPU", None)
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def report(cap: str, rows: list[dict]) -> list[str]:
    """Print a cap's table, the slowest cell of each layer and number of tokens; returns what is wrong."""
    print(f"\ncap {cap}\n{'layer':36} {'tokens':>6}  {'time over stock float32':24} error   what runs")
    groups = itertools.groupby(
        sorted(rows, key=lambda r: (r["layer"], r["tokens"])), lambda r: (r["layer"], r["tokens"])
    )
    for (layer, tokens), some in groups:
        cells = list(some)
        ratios = sorted(cell["ratio"] for cell in cells)
        runs = "; ".join(sorted({cell["runs"] for cell in cells}))
        span = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{layer:36} {tokens:6}  {span:24} {max(cell['error'] for cell in cells):.0e}   {runs}")
    wrong = []
    for row in rows:
        where = f"{row['layer']}, {row['shape']}, {row['tokens']} tokens, {row['dtype']}, by {row['runs']}, cap {cap}"
        if row["ratio"] > most(row["runs"]):
            wrong.append(f"{where}: {row['ratio']:.1f} times stock's time, at most {most(row['runs']):.0f} is allowed")
        if not row["error"] <= row["bound"]:
            wrong.append(f"{where}: an error of {row['error']:.1e}, at most {row['bound']:.1e} is allowed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Two shapes, float32 inputs, up to 128 tokens.")
    parser.add_argument(
        "--caps", nargs="+", choices=CAPS, help="Only these; by default all that change something here."
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    run = run_here if args.here else check_caps
    run(args)


def check_caps(args: argparse.Namespace) -> None:
    print(f"{device_name(torch.device('cpu'))}, one thread, torch {torch.__version__}")
    wrong = [line for cap in args.caps or possible_caps() for line in report(cap, run_capped(cap, args))]
    if wrong:
        sys.exit("\n" + "\n".join(wrong))
    print(f"\nno route takes more than {SLOWEST:.0f} times stock's time, twice that per call")
    print("every error is within its bound")


if __name__ == "__main__":
    main()
