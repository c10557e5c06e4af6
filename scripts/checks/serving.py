"""Serve one packed model from many threads: each answer that of one thread, and memory that does not grow with lengths.

    python scripts/checks/serving.py                                      # 10,000 requests of 2,400 lengths, 8 threads
    python scripts/checks/serving.py --model folder/ --requests 500 --lengths 128

The model is quantized to 8 bit with one scale a row and inputs rounded per token, its tables too, as a recipe for the
CPU does; without `--model` it is a random Llama of one layer, of width 128 with one head of 8, since these lengths
take hours in a large one. Memory is looked at when each thread has answered the shortest and the longest request, and
after each tenth of the requests; what is kept of the answers lies there from the beginning. Only then one thread
answers every length alone, so that nothing of that is there before. Answers may differ by the rounding of float32,
whose sums MKL splits by the threads that are free.
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
from transformers import AutoModel, LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_compress as hfc  # noqa: E402
from hf_compress.layers.packed_module import routes_of  # noqa: E402
from hf_compress.measuring.measure import device_name  # noqa: E402

ROUNDING = 2e-4  # of the largest value of an answer: a step of 8 bits may fall on its other side
GROWTH = 50  # MiB at most, over all requests
PARTS = 10


@torch.no_grad()
def answer(model: nn.Module, length: int) -> Tensor:
    """What is compared of the states of the one text that there is of that length: first, last and mean, (3 * D,)."""
    ids = torch.randint(5, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    states = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
    return torch.cat([states[0], states[-1], states.mean(0)])


def serve(model: nn.Module, requests: int, lengths: int, threads: int) -> tuple[list[int], Tensor, list[float]]:
    """The length and the answer of each request, and MiB of this process before the first and after each tenth."""
    order = [1 + number % lengths for number in range(requests)]
    random.Random(0).shuffle(order)
    answers = torch.ones(requests, 3 * model.config.hidden_size)  # ones: pages that are only asked for are not there

    def one(number: int) -> None:
        answers[number] = answer(model, order[number])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda length: answer(model, length), [1, lengths] * threads))
        memory = [resident()]
        for part in range(PARTS):
            list(pool.map(one, range(requests * part // PARTS, requests * (part + 1) // PARTS)))
            memory.append(resident())
    return order, answers, memory


def largest_difference(model: nn.Module, order: list[int], answers: Tensor) -> float:
    """Between an answer among threads and one given alone, relative to the largest value of that."""
    alone = {length: answer(model, length) for length in sorted(set(order))}
    return max(
        float((found - alone[length]).abs().max() / alone[length].abs().max())
        for length, found in zip(order, answers, strict=True)
    )


def resident() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(folder: Path | None, longest: int) -> nn.Module:
    if folder is None:
        torch.manual_seed(0)
        model = LlamaModel(LlamaConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
                                       num_key_value_heads=1, intermediate_size=256, vocab_size=1000, use_cache=False,
                                       max_position_embeddings=longest)).eval()  # fmt: skip
    else:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return hfc.quantize(model, 8, group_size=-1, symmetric=True, activation_bits=8, embedding_bits=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A classifier or embedder.")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--lengths", type=int, default=2400, help="Requests have 1 to that many tokens.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, begin = load(args.model, args.lengths), time.perf_counter()
    order, answers, memory = serve(model, args.requests, args.lengths, args.threads)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}: {routes_of(model)}")
    taken, looks = time.perf_counter() - begin, " ".join(f"{now:.0f}" for now in memory)
    lengths = len(set(order))
    print(
        f"{len(order)} requests of {lengths} lengths in {args.threads} threads, {taken:.0f} s: MiB {looks}", flush=True
    )
    worst, grown = largest_difference(model, order, answers), max(memory) - memory[0]
    print(f"answers within {worst:.1e} of those given alone, {grown:.0f} MiB more at most")
    if not worst <= ROUNDING or grown > GROWTH:
        sys.exit(f"At most {ROUNDING:.0e} is rounding, and {GROWTH} MiB may be more.")


if __name__ == "__main__":
    main()
