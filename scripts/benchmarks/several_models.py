"""Methods in which models teach one another, or that try a model out: what the board's recipes cannot say.

    python scripts/benchmarks/several_models.py --data movie_reviews/ --output runs/several
    python scripts/benchmarks/several_models.py --data movie_reviews/ --output runs/several --report

All students have two of the teacher's layers, evenly spaced, and learn in 50 steps of 32 sentences, as on the board.
The second teacher is the first one's base, fine-tuned in 30 steps. `--report` gives each run's accuracy over seeds, and
its difference to the run that it answers, in pairs over seeds and held-out sentences, with its interval.
"""

import logging
import time
from statistics import fmean

from classifier_bench import ClassifierBench, few, parser
from distillation_table import answers
from transformers import AutoModelForSequenceClassification, Trainer, set_seed

import hf_compress as hfc
from hf_compress.pruning.importance import every_other, search_layers
from hf_compress.report.differences import paired_difference

SOFT = {"alpha": 0.9, "temperature": 2.0}
RUNS = {  # name -> the run that it is held against
    "labels alone": None, "soft targets": "labels alone", "mutual": "labels alone", "self-distillation": "labels alone",
    "mean of two teachers": "soft targets", "two teachers, a cut-off": "mean of two teachers",
    "every other layer, at once": None, "layers by search, at once": "every other layer, at once",
}  # fmt: skip


class Bench(ClassifierBench):
    def run(self, name: str, seed: int) -> None:
        if self.is_done(name, seed):
            return
        set_seed(seed)
        start = time.perf_counter()
        self.record(name, seed, self.made(name, seed), start)

    def made(self, name: str, seed: int):
        settings = {"seed": seed, "learning_rate": 3e-4, "epochs": 1, "max_steps": self.args.steps}
        teacher = self.teacher()
        if name.endswith("at once"):
            layers = teacher.config.num_hidden_layers
            search = name.startswith("layers by search")
            keep = search_layers(teacher, self.validated, layers // 2) if search else every_other(layers, 0.5)
            return hfc.prune_layers(teacher, keep=keep)
        if name == "self-distillation":  # whose exit is the student
            args = self.config(hfc.SelfDistillationConfig, **settings, exits="2")
            trainer = hfc.SelfDistillationTrainer(teacher, args, **self.data_arguments())
            trainer.train()
            return trainer.exit_model(2)
        student = hfc.make_student(teacher, num_hidden_layers=2)
        if name == "labels alone":
            trainer = Trainer(student, self.config(**settings), **self.data_arguments())
        elif name == "mutual":
            peer = hfc.make_student(teacher, num_hidden_layers=2, layers="last")
            trainer = hfc.MutualTrainer(
                student, self.config(hfc.MutualConfig, **settings), peers=[peer], **self.data_arguments()
            )
        else:
            teachers = [teacher] if name == "soft targets" else [teacher, self.second_teacher()]
            weights = hfc.weigh_teachers(teachers, self.validated) if name.endswith("cut-off") else None
            args = self.config(hfc.DistillationConfig, **settings, **SOFT, teacher_weights=weights)
            teachers = teachers if len(teachers) > 1 else teacher
            trainer = hfc.DistillationTrainer(student, args, teacher_model=teachers, **self.data_arguments())
        trainer.train()
        return student

    def second_teacher(self):
        folder = self.output / "second-teacher"
        if not (folder / "config.json").exists():
            set_seed(1)
            model = AutoModelForSequenceClassification.from_pretrained(self.args.model)
            args = self.config(epochs=1, seed=1, learning_rate=1e-4, max_steps=30)
            Trainer(model, args, **self.data_arguments()).train()
            model.save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder)

    def validated(self, model) -> float:
        """Accuracy on training sentences: what is held out is for the figures."""
        held_out, self.held_out = self.held_out, few(self.data["train"], 500)
        try:
            return fmean(self.correct(model))
        finally:
            self.held_out = held_out

    def report(self) -> None:
        lines = {name: [line for line in self.results() if line["run"] == name] for name in ("teacher", *RUNS)}
        for name, own in lines.items():
            if own:
                text = f"{name}: {fmean(line['accuracy'] for line in own):.1%} ({len(own)} seed{'s' * (len(own) > 1)})"
                if (against := RUNS.get(name)) and lines[against]:
                    found = paired_difference(answers(lines[against]), answers(own))
                    value, low, high = (100 * one for one in vars(found.interval).values())
                    text += f", {value:+.1f} points over {against} ({low:+.1f} to {high:+.1f})"
                print(text)


def main() -> None:
    options = parser(__doc__, "runs/several")
    options.add_argument("--steps", type=int, default=50, help="Of each training.")
    args = options.parse_args()
    logging.basicConfig(level=logging.WARNING)
    bench = Bench(args)
    if not args.report:
        bench.record_teacher()
        for seed in args.seeds:
            for name in RUNS:
                if seed == args.seeds[0] or not name.endswith("at once"):
                    bench.run(name, seed)
    bench.report()


if __name__ == "__main__":
    main()
