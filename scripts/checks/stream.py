"""Train on a stream of millions of tokens: memory that stays, and a training that is stopped in its middle goes on.

    python scripts/checks/stream.py --tokens 10_000_000

A tiny student follows a tiny teacher, word by word, on rows of tokens that `datasets` reads from files as it goes, as
from a disk or the Hub. One training runs to its end and is looked at after each tenth of its steps. Another one of the
same weights stops halfway; a third, with other weights, takes up its checkpoint, and has to log the losses of the
first, to the last bit. It reads only the rest of the stream: rows that are read are counted.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hf_compress as hfc  # noqa: E402
from scripts.checks.soak import resident_mib  # noqa: E402

CLASSES, LENGTH, BATCH, FILES = 256, 256, 64, 8
GROWTH = 16  # MiB at most, from the first tenth of the steps to the last
TENTHS = 10


class Looks(TrainerCallback):
    """MiB of this process after each tenth of the steps, and an end after step `stop`."""

    def __init__(self, steps: int, stop: int | None = None):
        self.every, self.stop, self.memory = max(1, steps // TENTHS), stop, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.memory.append(resident_mib())
        if state.global_step == self.stop:
            control.should_training_stop = True


def write(folder: Path, rows: int) -> list[str]:
    """Files of random rows, in which a token tells something of the next one."""
    generator, files = torch.Generator().manual_seed(0), []
    for number in range(FILES):
        files.append(str(folder / f"{number}.jsonl"))
        with Path(files[-1]).open("w", encoding="utf-8") as file:
            for _ in range(rows * number // FILES, rows * (number + 1) // FILES):
                steps = torch.randint(0, 8, (LENGTH,), generator=generator)
                file.write(json.dumps({"input_ids": (steps.cumsum(0) % CLASSES).tolist()}) + "\n")
    return files


def tiny(seed: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=CLASSES, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    ))  # fmt: skip


class Train:
    """Trainings of `steps` steps on the rows of `files`, each in a folder of its own."""

    def __init__(self, files: list[str], steps: int):
        self.files, self.steps = files, steps

    def __call__(self, folder: Path, *, seed: int = 1, stop: int | None = None, resume: Path | None = None):
        """The losses by step, what was seen, and how many rows were read."""
        read = [0]

        def with_labels(row):
            read[0] += 1
            return {**row, "labels": row["input_ids"]}

        stream = load_dataset("json", data_files=self.files, split="train", streaming=True).map(with_labels)
        config = hfc.WordLevelConfig(
            str(folder), max_steps=self.steps, per_device_train_batch_size=BATCH, use_cpu=True, report_to="none",
            logging_steps=self.steps // 20, disable_tqdm=True, learning_rate=1e-3,
            save_steps=self.steps // 2, save_total_limit=1, finish_at_end=False,
        )  # fmt: skip
        looks = Looks(self.steps, stop)
        trainer = hfc.WordLevelTrainer(
            tiny(seed, 8), config, teacher_model=tiny(0, 16), train_dataset=stream, callbacks=[looks]
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        return losses, looks.memory, read[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin, steps = time.time(), -(-args.tokens // (20 * LENGTH * BATCH)) * 20
    half = steps // 2
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train = Train(write(folder, steps * BATCH), steps)
        whole, memory, read = train(folder / "whole")
        print(f"{steps} steps, {steps * BATCH * LENGTH:,} tokens, {read:,} rows read: MiB after each tenth "
              f"{' '.join(f'{now:.0f}' for now in memory)}", flush=True)  # fmt: skip
        first, _, _ = train(folder / "stopped", stop=half)
        rest, _, read = train(folder / "resumed", seed=2, resume=folder / "stopped" / f"checkpoint-{half}")
    same = {**first, **rest} == whole
    losses = f"{len(whole)} losses, {whole[min(whole)]:.4f} to {whole[max(whole)]:.4f},"
    print(f"stopped after {half} steps, resumed with {read:,} rows read: {losses} are "
          f"{'the same' if same else 'others'}; {time.time() - begin:.0f} s")  # fmt: skip
    grown = max(memory) - memory[0]
    if not same or grown > GROWTH or read > (half + 2) * BATCH:
        sys.exit(f"Losses have to be the same, growth at most {GROWTH} MiB, and only the rest is read.")


if __name__ == "__main__":
    main()
