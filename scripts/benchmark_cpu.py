"""Time packed and block-sparse linear layers on the CPU beside what else runs there, and check every result.

    python scripts/benchmark_cpu.py --threads 2                          # every shape; wants onnxruntime and onnx
    python scripts/benchmark_cpu.py --shapes 4096x4096 --tokens 1 --bits 4 --cold
    python scripts/benchmark_cpu.py sparse --blocks 16 32 --densities 0.1 0.25
    python scripts/benchmark_cpu.py --model tiny                         # seconds, on any machine

Libraries with thread pools of their own run in a process of their own, in turn, `--passes` times: the workers of one
spin for a while after a call and would take a core from the next. Within a process the candidates take turns. With one
thread the clock is the processor time of the calling thread, which other work on the machine disturbs least; with more
it is the wall clock. Reported per cell: microseconds of `F.linear` in float32, each candidate's speed over it, over the
prepacked bfloat16 product, and ours over the best other; `!` marks a cell whose passes differ by more than 20%. With
`--cold` a call takes the next of enough copies of the weight to leave the caches cold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_compress.engines.processor import instructions  # noqa: E402
from hf_compress.layers.block_sparse import BlockSparseLinear  # noqa: E402
from hf_compress.layers.packed_linear import PackedLinear  # noqa: E402
from hf_compress.layers.scheme import WeightScheme  # noqa: E402
from hf_compress.measuring.timing import time_interleaved  # noqa: E402
from hf_compress.quantization.round_to_nearest import round_to_nearest  # noqa: E402

SHAPES = ["576x576", "1536x576", "768x768", "3072x768", "768x3072", "4096x4096", "11008x4096"]
COLD_BYTES = 160 << 20
CALLS = 50  # at most, in a turn of a candidate: the first one finds the caches full of another
PRODUCTS = 10**9  # multiplications after which a turn ends
LARGEST_ERROR = 0.02  # against float64 with the weight that the candidate stores
OURS = "hf_compress"
Call = Callable[[Tensor], Tensor]  # x float32 (M, K) -> (M, N)


def packed(weight: Tensor, bits: int, group_size: int) -> tuple[PackedLinear, Tensor]:
    """The layer of `weight` (N, K), and the weight it stands for in float64."""
    N, K = weight.shape
    scheme = WeightScheme(bits, group_size, symmetric=group_size == -1)
    layer = PackedLinear(K, N, scheme, bias=False)
    rounded = round_to_nearest(weight, scheme, range_method="minmax")
    layer.fill(rounded.q, rounded.scales, rounded.zero_points)
    return layer, layer.dequantize(torch.float64)


def torch_candidates(weight: Tensor, bits: int, group_size: int) -> Iterator[tuple[str, Call, Tensor]]:
    """Name, call and the float64 weight it should multiply by, for everything that runs on PyTorch's threads."""
    exact, half = weight.double(), weight.bfloat16()
    prepacked = torch.ops.mkldnn._reorder_linear_weight(half, None)
    yield "float32", lambda x: F.linear(x, weight), exact
    yield "bfloat16", lambda x: F.linear(x.bfloat16(), half).float(), exact
    yield (
        "bfloat16 prepacked",
        lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), prepacked, None, "none", [], "").float(),
        exact,
    )
    layer, stored = packed(weight, bits, group_size)
    yield OURS, layer, stored
    if bits == 8:
        yield from dynamic_int8(weight)
    try:
        import bitsandbytes.functional as bnb

        if bits == 4:
            data, state = bnb.quantize_4bit(half, blocksize=64, quant_type="nf4")
            restored = bnb.dequantize_4bit(data, state).double()
            yield (
                "bitsandbytes nf4",
                lambda x: F.linear(x.bfloat16(), bnb.dequantize_4bit(data, state)).float(),
                restored,
            )
    except ImportError:
        pass


def dynamic_int8(weight: Tensor) -> Iterator[tuple[str, Call, Tensor]]:
    scale = weight.abs().amax(1) / 127
    q = (weight / scale[:, None]).round()
    exact = q.double() * scale.double()[:, None]
    quantized = torch._make_per_channel_quantized_tensor(
        q.to(torch.int8), scale.double(), torch.zeros(len(q), dtype=torch.long), 0
    )
    for engine in ("fbgemm", "onednn"):
        torch.backends.quantized.engine = engine
        prepacked = torch.ops.quantized.linear_prepack(quantized, None)

        def call(x: Tensor, prepacked=prepacked, engine=engine) -> Tensor:
            torch.backends.quantized.engine = engine
            return torch.ops.quantized.linear_dynamic(x, prepacked)

        yield f"linear_dynamic {engine}", call, exact


def onnxruntime_candidates(weight: Tensor, bits: int, group_size: int) -> Iterator[tuple[str, Call, Tensor]]:
    """MatMulNBits with 8-bit accumulation, through bindings to torch's memory."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    if bits == 3:  # it has 2, 4 and 8
        return
    N, K = weight.shape
    group_size = max(group_size, 64 if group_size == -1 else 0)
    layer, stored = packed(weight, bits, group_size)
    q, zeros, _ = layer.integers()
    per_byte, G = 8 // bits, K // group_size
    shifts = torch.arange(per_byte) * bits

    def as_bytes(values: Tensor) -> np.ndarray:
        values = F.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte)).int()
        return (values << shifts).sum(-1).to(torch.uint8).numpy()

    tensors = {
        "B": as_bytes(q.view(N, G, group_size)),
        "S": layer.scales.t().float().contiguous().numpy().reshape(-1),
        "Z": as_bytes(zeros.t()).reshape(-1),
    }
    node = helper.make_node("MatMulNBits", ["A", *tensors], ["Y"], domain="com.microsoft", K=K, N=N, bits=bits,
                            block_size=group_size, accuracy_level=4)  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("A", K), ("Y", N))]
    initial = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], initial)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()

    def call(x: Tensor) -> Tensor:
        y = torch.empty(len(x), N)
        binding.bind_input("A", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output("Y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())
        session.run_with_iobinding(binding)
        return y

    yield "onnxruntime", call, stored


FAMILIES = {"torch": torch_candidates, "onnxruntime": onnxruntime_candidates}


def sparse_candidates(weight: Tensor, block: int, density: float) -> Iterator[tuple[str, Call, Tensor]]:
    N, K = weight.shape
    mask = torch.rand(-(-N // block), -(-K // block), generator=torch.Generator().manual_seed(0)) < density
    layer = BlockSparseLinear.from_dense(torch.nn.Linear(K, N, bias=False), mask, (block, block))
    pruned = layer.weight.as_subclass(Tensor).detach()
    layer_half = BlockSparseLinear.from_dense(torch.nn.Linear(K, N, bias=False), mask, (block, block))
    layer_half.load_state_dict(layer.state_dict())
    layer_half.bfloat16()
    half = pruned.bfloat16()
    prepacked = torch.ops.mkldnn._reorder_linear_weight(half, None)
    sparse = pruned.to_sparse_bsr((block, block))
    yield "float32", lambda x: F.linear(x, pruned), pruned.double()
    yield "torch BSR", lambda x: F.linear(x, sparse), pruned.double()
    yield (
        "bfloat16 prepacked",
        lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), prepacked, None, "none", [], "").float(),
        half.double(),
    )
    yield OURS, layer, pruned.double()
    yield f"{OURS} bfloat16", lambda x: layer_half(x.bfloat16()).float(), half.double()


def measure(candidates: list[list[tuple[str, Call, Tensor]]], tokens: int, args: argparse.Namespace) -> dict:
    """Microseconds of each candidate in each round; `candidates` has one list for each copy of the weight."""
    names = [name for name, _, _ in candidates[0]]
    in_a_turn = max(1, min(CALLS, PRODUCTS // (tokens * candidates[0][0][2].numel())))
    x = torch.randn(tokens, candidates[0][0][2].shape[1], generator=torch.Generator().manual_seed(1))
    for name, call, weight in candidates[0]:
        oracle = x.double() @ weight.t()
        error = float((call(x).double() - oracle).norm() / oracle.norm())
        if error > LARGEST_ERROR:
            raise SystemExit(f"{name} is wrong at {tuple(weight.shape)}, {tokens} tokens: relative error {error:.3f}.")

    def turn(index: int) -> Callable[[], object]:
        """Several calls: the caches are warm with this candidate's weight, or with none if there are many copies."""
        calls, place = [copy[index][1] for copy in candidates], iter(range(sys.maxsize))

        def repeat() -> None:
            for _ in range(in_a_turn):
                calls[next(place) % len(calls)](x)

        return repeat

    clock = time.thread_time if args.threads == 1 else time.perf_counter
    seconds = time_interleaved([turn(i) for i in range(len(names))], rounds=args.rounds, clock=clock)
    return {name: [1e6 * s / in_a_turn for s in samples] for name, samples in zip(names, seconds, strict=True)}


@torch.no_grad()
def run_family(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    results = {}
    for shape in args.shapes:
        N, K = map(int, shape.split("x"))
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
        group_size = next((size for size in (128, 64, 32) if K % size == 0), -1)
        if args.what == "sparse":
            cases = {f"{block}x{block} {density:.0%}": (sparse_candidates, block, density)
                     for block in args.blocks for density in args.densities}  # fmt: skip
        else:
            family = FAMILIES[args.family]
            cases = {f"{bits} bit": (family, bits, -1 if bits == 8 else group_size) for bits in args.bits}
        for case, (make, *options) in cases.items():
            copies = -(-COLD_BYTES // (2 * N * K)) if args.cold else 1
            candidates = [list(make(weight.clone(), *options)) for _ in range(copies)]
            for tokens in args.tokens if candidates[0] else ():
                results[f"{shape} {case} M={tokens}"] = measure(candidates, tokens, args)
    return results


def in_turn(families: list[str], *, passes: int, threads: int) -> list[dict[str, dict[str, list[float]]]]:
    """What this script prints with `--family`, {cell: {candidate: samples}}, for each pass over the families."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    results = []
    for _ in range(passes):
        merged: dict[str, dict] = {}
        for family in families:
            command = [sys.executable, "-W", "ignore", *sys.argv, "--family", family]
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            for cell, timings in json.loads(output.splitlines()[-1]).items():
                merged.setdefault(cell, {}).update(timings)
        results.append(merged)
    return results


def table(passes: list[dict[str, dict[str, list[float]]]]) -> list[dict]:
    rows = []
    for cell, first in passes[0].items():
        each = {name: [statistics.median(p[cell][name]) for p in passes] for name in first}
        us = {name: statistics.median(values) for name, values in each.items()}
        noisy = {name for name, values in each.items() if max(values) > 1.2 * min(values)}
        others = {name: value for name, value in us.items() if not name.startswith(OURS)}
        best = min(others, key=others.get)
        ours = min(value for name, value in us.items() if name.startswith(OURS))
        over = {"over_best": others[best] / ours, "over_prepacked": us["bfloat16 prepacked"] / ours}
        rows.append({"cell": cell, "us": us, "noisy": sorted(noisy), "best_other": best, **over})
    return rows


def report(rows: list[dict]) -> None:
    for row in rows:
        base = row["us"]["float32"]
        speeds = ", ".join(f"{name} {base / us:.2f}{'!' if name in row['noisy'] else ''}"
                           for name, us in row["us"].items() if name != "float32")  # fmt: skip
        ours = f"over prepacked bfloat16 {row['over_prepacked']:.2f}, over {row['best_other']} {row['over_best']:.2f}"
        print(f"{row['cell']}: float32 {base:.0f} us; {speeds}; {OURS} {ours}")
    over = [row["over_best"] for row in rows]
    print(f"over the best other: geometric mean {statistics.geometric_mean(over):.2f}, lowest {min(over):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("linear", "sparse"), default="linear")
    parser.add_argument("--model", choices=("tiny",), help="One small shape: does it run?")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="Outputs x inputs.")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8], choices=(2, 3, 4, 8))
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.25, 0.5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="Rotate copies of the weight that do not fit the caches.")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--output", type=Path, help="Write all samples here, as JSON.")
    parser.add_argument("--family", choices=FAMILIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model == "tiny":
        args.shapes, args.tokens, args.passes, args.rounds = ["192x256"], [1, 8], 1, 2
    if args.family:
        print(json.dumps(run_family(args)))
        return
    passes = in_turn(args.families if args.what == "linear" else ["torch"], passes=args.passes, threads=args.threads)
    setting = f"{args.threads} threads, {args.passes} passes of {args.rounds} rounds"
    print(f"torch {torch.__version__}, {instructions()}, {setting}")
    report(table(passes))
    if args.output:
        args.output.write_text(json.dumps(passes), encoding="utf-8")


if __name__ == "__main__":
    main()
