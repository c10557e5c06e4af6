"""Time the kernels against the alternatives, on the device at hand, and check every timed point.

    python scripts/benchmarks/kernel_times.py linear --shapes 4096x4096 --rows 1 16 256
    python scripts/benchmarks/kernel_times.py bsr --density 0.1 --block 32 64
    python scripts/benchmarks/kernel_times.py kl --vocabulary 32000 --rows 256
    python scripts/benchmarks/kernel_times.py linear --model tiny        # seconds, on any machine

On CUDA and ROCm a call is captured 20 times in a graph and the graph is replayed, over enough copies of the weights to
leave the cache cold; elsewhere calls are timed one by one. Reported: the median and the 10 to 90 % range of 5 repeats,
the ratio to the dense product (or eager loss) in the same process, the memory bandwidth or rate that the median means.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [
    str(Path(__file__).resolve().parents[2]),
    str(Path(__file__).resolve().parents[2] / "triton_kernels/torch-ext"),
]

import hf_compress_kernels as k  # noqa: E402

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}  # relative, against the dense product
CALLS_IN_GRAPH = 20
REPEATS = 5


def describe_device(device: torch.device) -> dict:
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        return versions | {"device": properties.name, "memory_bytes": properties.total_memory,
                           "multiprocessors": properties.multi_processor_count, "triton": triton.__version__,
                           "cuda": torch.version.cuda, "hip": torch.version.hip}  # fmt: skip
    return versions | {"device": platform.processor() or platform.machine()}


def time_calls(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Microseconds of one call, once per repeat. `calls` are the same work on different copies of the weights."""
    order = [calls[i % len(calls)] for i in range(CALLS_IN_GRAPH)]
    for call in order[:3]:
        call()
    if device.type != "cuda":
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            count = 0
            while count < 3 or time.perf_counter() - start < 0.05:
                order[count % len(order)]()
                count += 1
            seconds.append((time.perf_counter() - start) / count)
        return [s * 1e6 for s in seconds]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in order:
            call()
    results = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(50):
            graph.replay()
        end.record()
        end.synchronize()
        results.append(start.elapsed_time(end) * 1e3 / (50 * CALLS_IN_GRAPH))
    return results


def copies_to_leave_cache(weight_bytes: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(CALLS_IN_GRAPH, 1 + 4 * cache // weight_bytes)


def check(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < BOUND[actual.dtype]:
        raise RuntimeError(f"{name} is wrong: relative error {error:.1e}. Its time would mean nothing.")


def summary(name: str, times_us: list[float], baseline_us: float | None, **numbers: object) -> dict:
    ordered = sorted(times_us)
    median = statistics.median(ordered)
    row = {
        "name": name,
        "median_us": round(median, 2),
        "low_us": round(ordered[0], 2),
        "high_us": round(ordered[-1], 2),
    }
    return row | ({"ratio": float(f"{baseline_us / median:.3g}")} if baseline_us else {}) | numbers


def benchmark_linear(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    for shape in args.shapes:
        N, K = map(int, shape.split("x"))
        group = args.group_size if args.group_size > 0 else K
        for bits in args.bits:
            ints = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, device=device)
            scales = torch.rand(K // group, N, device=device) * 0.01 + 0.001
            zeros = torch.full((K // group, N), 1 << bits - 1, dtype=torch.uint8, device=device)
            packed = k.wna16_pack(ints, scales, zeros, bits, group, dtype)
            dense = k.wna16_dequant(packed)
            packed_copies = [
                packed._replace(qweight=packed.qweight.clone(), sz=packed.sz.clone())
                for _ in range(copies_to_leave_cache(packed.qweight.numel() * 2, device))
            ]
            dense_copies = [dense.clone() for _ in range(copies_to_leave_cache(dense.nbytes, device))]
            for M in args.rows:
                x = torch.randn(M, K, dtype=dtype, device=device)
                check("wna16_linear", k.wna16_linear(x, packed), x @ dense.t())
                base = time_calls([partial(F.linear, x, w) for w in dense_copies], device)
                ours = time_calls([partial(k.wna16_linear, x, w) for w in packed_copies], device)
                both = time_calls([partial(dequantize_and_multiply, x, w) for w in packed_copies], device)
                where = {"bits": bits, "M": M, "N": N, "K": K, "group_size": group}
                baseline = statistics.median(base)
                yield summary("torch.mm", base, None, **where)
                gigabytes = round((packed.qweight.nbytes + packed.sz.nbytes) / statistics.median(ours) / 1e3, 1)
                yield summary("wna16_linear", ours, baseline, gigabytes_per_s=gigabytes, **where)
                yield summary("dequantize + mm", both, baseline, **where)
                for name, call in other_low_bit(ints, scales, zeros, bits, group, dtype, x):
                    yield summary(name, time_calls([call], device), baseline, **where)


def dequantize_and_multiply(x: torch.Tensor, weight: k.PackedWeight) -> torch.Tensor:
    return F.linear(x, k.wna16_dequant(weight))


def other_low_bit(ints, scales, zeros, bits, group, dtype, x) -> Iterator[tuple[str, Callable[[], object]]]:
    """Peers that are installed and take the case: torch's tinygemm and gemlite."""
    if not x.is_cuda or bits != 4:
        return
    if dtype == torch.bfloat16 and group in (32, 64, 128, 256):
        flipped = (ints[:, ::2] << 4 | ints[:, 1::2]).contiguous()
        weight = torch.ops.aten._convert_weight_to_int4pack(flipped, 8)
        offsets = (8 - zeros.float()) * scales
        both = torch.stack([scales, offsets], dim=-1).to(dtype)  # (G, N, 2)
        yield "tinygemm", lambda: torch.ops.aten._weight_int4pack_mm(x, weight, group, both)
    try:
        import gemlite
    except ImportError:
        return
    layer = gemlite.GemLiteLinear(
        bits, group_size=group, in_features=ints.shape[1], out_features=ints.shape[0],
        input_dtype=gemlite.TORCH_TO_DTYPE[dtype], output_dtype=gemlite.TORCH_TO_DTYPE[dtype],
    )  # fmt: skip
    layer.pack(ints, scales.t().contiguous().to(dtype), zeros.t().contiguous().to(dtype), None)
    yield "gemlite", lambda: layer(x)


def benchmark_bsr(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    for shape in args.shapes:
        N, K = map(int, shape.split("x"))
        for side in args.block:
            for density in args.density:
                block_mask = torch.rand(-(-N // side), -(-K // side), device=device) < density
                entries = block_mask.repeat_interleave(side, 0).repeat_interleave(side, 1)[:N, :K]
                dense = (torch.randn(N, K, device=device) * entries).to(dtype)
                weight = k.bsr_from_dense(dense, block_mask, (side, side))
                for M in args.rows:
                    x = torch.randn(M, K, dtype=dtype, device=device)
                    check("bsr_linear", k.bsr_linear(x, weight), x @ dense.t())
                    base = time_calls([partial(F.linear, x, dense)], device)
                    baseline = statistics.median(base)
                    where = {"block": side, "density": round(weight.density, 3), "M": M, "N": N, "K": K}
                    yield summary("torch.mm", base, None, **where)
                    times = time_calls([partial(k.bsr_linear, x, weight)], device)
                    yield summary("bsr_linear", times, baseline, **where)
                    is_there = device.type == "cuda" or dtype is torch.float32  # MKL's has no other dtype
                    if is_there and N % side == 0 and K % side == 0:
                        torch_bsr = dense.to_sparse_bsr((side, side))
                        times = time_calls([partial(F.linear, x, torch_bsr)], device)
                        yield summary("torch BSR", times, baseline, **where)


def benchmark_kl(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    def eager(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_s, log_t = (F.log_softmax(logits.float(), dim=-1) for logits in (student, teacher))
        return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)

    def step(loss: Callable, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student.grad = None
        loss(student, teacher).sum().backward()
        return student.grad

    for M in args.rows:
        student, teacher = (torch.randn(M, args.vocabulary, dtype=dtype, device=device) for _ in range(2))
        student.requires_grad_()
        expected = step(eager, student, teacher)
        check("kl_from_logits", step(k.kl_from_logits, student, teacher), expected)
        base = time_calls([partial(step, eager, student, teacher)], device)
        where = {"M": M, "V": args.vocabulary}
        yield summary("eager KL, forward and backward", base, None, **where)
        losses = {"kl_from_logits": k.kl_from_logits}
        if args.model != "tiny":  # compiling takes longer than all the rest
            losses["compiled KL"] = torch.compile(eager)
        for name, loss in losses.items():
            times = time_calls([partial(step, loss, student, teacher)], device)
            yield summary(name, times, statistics.median(base), **where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["linear", "bsr", "kl"])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="out_features x in_features.")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 256, 1024], help="Rows of x (tokens).")
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--group-size", type=int, default=128, help="-1 for the whole row.")
    parser.add_argument("--block", nargs="+", type=int, default=[32, 64], help="Sides of sparse blocks.")
    parser.add_argument(
        "--density", nargs="+", type=float, default=[0.1, 0.25], help="Shares of blocks that are stored."
    )
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="Default: float16 on a GPU, else float32."
    )
    parser.add_argument("--model", choices=["tiny"], help="Small shapes, for a look at the output.")
    parser.add_argument("--output", type=Path, help="Also write the rows as JSON.")
    args = parser.parse_args()
    if args.model == "tiny":
        args.shapes, args.rows, args.vocabulary, args.block = ["128x256"], [1, 8], 100, [32]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    described = describe_device(device) | {"dtype": str(dtype)}
    print(json.dumps(described))
    rows = []
    for row in {"linear": benchmark_linear, "bsr": benchmark_bsr, "kl": benchmark_kl}[args.what](args, device, dtype):
        rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    if args.output:
        args.output.write_text(json.dumps({"device": described, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
