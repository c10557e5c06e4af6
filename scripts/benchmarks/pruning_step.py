"""What pruning adds to a training step of the stock `Trainer`, at steps that update no mask.

    python scripts/benchmarks/pruning_step.py --data movie_reviews/ --model runs/pruning/teacher

Short trainings take turns, plain and with each callback; each gives the median processor time from the beginning of a
step to its end. Printed are the quartiles over turns of the ratio to the plain training of the same turn.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_compress as hfc
from hf_compress.measuring.measure import device_name
from hf_compress.model.precision import has_fast_bfloat16
from hf_compress.recipe.texts import load_texts, tokenize

CALLBACKS = {  # each updates its masks before or after the steps that are timed
    "heads": lambda: hfc.HeadPruning(0.4, begin=0.0, end=1.0, num_updates=1),
    "neurons": lambda: hfc.NeuronPruning(0.5, begin=0.0, end=1.0, num_updates=1),
    "weights, magnitude": lambda: hfc.WeightPruning(0.5, schedule="one-shot", begin=0.0),
    "weights, movement": lambda: hfc.WeightPruning(0.5, method="movement", begin=0.0, end=1.0, num_updates=1),
    "blocks, magnitude": lambda: hfc.BlockPruning(0.75, method="max", schedule="one-shot", begin=0.0),
    "blocks, taylor": lambda: hfc.BlockPruning(0.75, begin=0.0, end=1.0, num_updates=1),
}


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self._start)


def median_step(options: argparse.Namespace, tokenizer, rows, callback) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(options.model)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=options.steps + 2, learning_rate=1e-6, per_device_train_batch_size=32,
            save_strategy="no", report_to="none", bf16=has_fast_bfloat16(), use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        callbacks = [callback, times] if callback else [times]
        collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=64)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return quantile(times.seconds[1:-1], 0.5)  # the first step allocates, the last may update masks


def quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.double).quantile(share).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder with train, validation and test files.")
    parser.add_argument("--model", type=Path, required=True, help="Folder of a fine-tuned classifier.")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="Timed steps of each training.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = tokenize(load_texts(str(options.data)), tokenizer, 64)["train"].select(range(32 * (options.steps + 2)))
    ratios: dict[str, list[float]] = {name: [] for name in CALLBACKS}
    for turn in range(options.turns):
        order = list(CALLBACKS)[:: 1 if turn % 2 else -1]
        plain = [median_step(options, tokenizer, rows, None)]
        found = {name: median_step(options, tokenizer, rows, CALLBACKS[name]()) for name in order}
        plain.append(median_step(options, tokenizer, rows, None))
        for name, seconds in found.items():
            ratios[name].append(seconds / (sum(plain) / 2))
    facts = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "transformers": transformers.__version__, "plain_seconds": round(sum(plain) / 2, 4)}  # fmt: skip
    for name, values in ratios.items():
        facts[name] = [round(quantile(values, share), 3) for share in (0.25, 0.5, 0.75)]
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
