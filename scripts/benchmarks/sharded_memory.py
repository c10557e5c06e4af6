"""The most memory that a process takes to distil a language model: alone, and as one of several under FSDP2.

    OMP_NUM_THREADS=1 python scripts/benchmarks/sharded_memory.py            SmolLM2-135M's shape, 1 and 4 processes
    python scripts/benchmarks/sharded_memory.py --hidden 64 --layers 2 --classes 512 --length 16 --processes 1 2

Student and teacher have random weights, the loss is word by word over the whole vocabulary, the optimiser is AdamW. All
runs take the same batch, cut over their processes. What counts begins after the imports: the largest process of a run,
read from Linux's account of it, where what is freed goes back at once (`MALLOC_MMAP_THRESHOLD_`). Left to itself the C
library keeps the layers that were gathered, in pieces, and a rank grows beyond a process that has all.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]

import torch  # noqa: E402
from checks.cpu_fsdp import share_weights  # noqa: E402
from datasets import Dataset  # noqa: E402
from limits import resident  # noqa: E402
from scale import told_by  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import hf_compress as hfc  # noqa: E402
from hf_compress.measuring.measure import device_name, versions  # noqa: E402

SHAPE = {"hidden": 576, "layers": 30, "classes": 49_152, "length": 128, "batch": 4, "steps": 3}
FREED_AT_ONCE = 2**18  # bytes: larger blocks are mapped, and given back when they are freed


def model_of(args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=args.classes, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 192), tie_word_embeddings=True,
    ))  # fmt: skip


def worker(args: argparse.Namespace) -> None:
    """Trains as one of its run, and tells the MiB that it took beyond its imports, and the losses."""
    number = int(os.environ["WORLD_SIZE"])
    if number > 1:
        share_weights("LlamaDecoderLayer")
    before = resident("VmRSS")
    config = hfc.WordLevelConfig(
        args.folder, max_steps=args.steps, per_device_train_batch_size=args.batch // number, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-4,
        finish_at_end=False, bf16=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, args.classes, (args.steps * args.batch, args.length), generator=generator).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = hfc.WordLevelTrainer(model_of(args, 1), config, teacher_model=args.teacher, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"mib": resident("VmHWM") - before, "losses": losses}))


def run(args: argparse.Namespace, number: int, folder: str) -> list[dict]:
    """What each process of a run told."""
    options = [f"--{name}={getattr(args, name)}" for name in SHAPE]
    command = [sys.executable, __file__, "--worker", f"--folder={folder}/out", f"--teacher={folder}/teacher", *options]
    return told_by(command, number, MALLOC_MMAP_THRESHOLD_=FREED_AT_ONCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    model = model_of(args, 0)
    print(f"{device_name(torch.device('cpu'))}, {versions()}; student and teacher of {model.num_parameters():,} "
          f"parameters, {args.batch} rows of {args.length} tokens a step")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/teacher")
        del model
        alone = None
        for number in args.processes:
            found = run(args, number, folder)
            most = max(one["mib"] for one in found)
            alone = alone or most
            print(f"{number} processes: {most:,.0f} MiB at most in one, {most / alone:.2f} of the first; "
                  f"losses {found[0]['losses']}")  # fmt: skip


if __name__ == "__main__":
    main()
