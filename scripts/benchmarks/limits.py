"""How much memory GPTQ, cached teachers, augmentation and export take as their input grows 1, 4 and 16 times.

    python scripts/benchmarks/limits.py

Each measurement is a process of its own: the most resident memory while the job ran, less what was resident before it.
A streaming job needs as much at 16 times the input as at once the input. Prints a table in MiB, and the bytes of the
input in the form that the job could have held.
"""

import argparse
import gc
import json
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizerFast

import hf_compress as hfc

WIDTH, TOKENS, ROWS = 256, 64, 64  # once the input: 64 rows of 64 tokens
WORDS = 2000


def config(**changes) -> BertConfig:
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=4 * WIDTH,
                 vocab_size=WORDS + 5, max_position_embeddings=TOKENS)  # fmt: skip
    return BertConfig(**{**sizes, **changes})


def rows(number: int) -> Dataset:
    ids = torch.randint(5, WORDS, (number, TOKENS), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def word(number: int) -> str:
    """Letters in the place of digits: augmentation takes no word that holds digits."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:04}")


def tokenizer() -> BertTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(word, range(WORDS))]
    return BertTokenizerFast(vocab={text: i for i, text in enumerate(words)}, model_max_length=TOKENS)


def gptq(scale: int, folder: Path, offload: str) -> Callable[[], None]:
    model, data = BertForSequenceClassification(config()).eval(), rows(ROWS * scale)
    return lambda: hfc.quantize(model, 4, method="gptq", calibration=data, offload=offload, refinements=0)


def cached_teacher(scale: int, folder: Path) -> Callable[[], None]:
    model, data = BertForSequenceClassification(config()).eval(), rows(ROWS * scale)
    return lambda: hfc.cache_teacher(model, data, folder / "cache", hidden_states=[2], shard_size=64)


def augmentation(scale: int, folder: Path, *, to_disk: bool) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (ROWS * scale, 8), generator=generator).tolist()
    data = Dataset.from_dict({"text": [" ".join(map(word, row)) for row in ids]})
    model = BertForMaskedLM(config(hidden_size=32, intermediate_size=64)).eval()
    path = folder / "augmented" if to_disk else None
    return lambda: hfc.augment(data, tokenizer(), word_vectors=model, copies=4, path=path)


def export(scale: int, folder: Path) -> Callable[[], None]:
    model = hfc.quantize(BertForSequenceClassification(config(num_hidden_layers=2 * scale)).eval(), 4, symmetric=True)
    return lambda: hfc.export(model, folder / "exported", format="gptq")


def states(scale: int) -> int:
    return ROWS * scale * TOKENS * WIDTH * 4


JOBS = {  # name -> (job, bytes that it could hold at once, by scale)
    "gptq, inputs in memory": (lambda s, f: gptq(s, f, "cpu"), states),
    "gptq, inputs on disk": (lambda s, f: gptq(s, f, "disk"), states),
    "cached teacher, a layer's states": (cached_teacher, states),
    "augmentation in memory": (lambda s, f: augmentation(s, f, to_disk=False), lambda s: ROWS * s * 5 * 8 * 8),
    "augmentation on disk": (lambda s, f: augmentation(s, f, to_disk=True), lambda s: ROWS * s * 5 * 8 * 8),
    "export as gptq": (export, lambda s: 2 * s * 12 * WIDTH**2 // 2),
}


def resident(line: str) -> float:
    """MiB, of `VmRSS` now or `VmHWM` at most."""
    text = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(line))
    return int(text.split()[1]) / 1024


def measure(job: Callable, scale: int) -> float:
    """MiB that the job takes at most, in a fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with tempfile.TemporaryDirectory() as folder:
                run = job(scale, Path(folder))
                gc.collect()
                before = resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most so far is forgotten
                run()
                os.write(writing, json.dumps(resident("VmHWM") - before).encode())
            status = 0
        except Exception:
            traceback.print_exc()  # the parent says only that it failed
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"The measurement at {scale} times the input ended with status {status}.")
    return json.loads(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the jobs whose name holds this")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 4, 16])
    run = parser.parse_args()
    torch.set_num_threads(1)
    print("| MiB beside the model and the data set |" + "".join(f" {s}x |" for s in run.scales) + " it could hold |")
    print("|---|" + "---|" * (len(run.scales) + 1))
    for name, (job, size) in JOBS.items():
        if run.only is None or run.only in name:
            found = [measure(job, scale) for scale in run.scales]
            whole = " ".join(f"{size(scale) / 2**20:.0f}" for scale in run.scales)
            print(f"| {name} |" + "".join(f" {mib:.0f} |" for mib in found) + f" {whole} |", flush=True)


if __name__ == "__main__":
    main()
