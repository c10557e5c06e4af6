"""Other libraries beside this one on a subject of the board: the same model, texts, steps and seeds.

    pip install textbrewer==0.2.1.post1 optimum-quanto==0.2.7 torch-pruning==1.6.1
    python scripts/peers.py --data data/ --output runs/board

Each pair is a function below and the board's method that does the same. Both begin with the subject as this machine
makes it, and both answer its test texts; the difference is taken text by text and seed by seed. What is done is kept in
`peers.jsonl` of the output folder.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from evidence.cells import Cell, Rounds, packed, unpacked
from evidence.methods import FOLDER as RECIPES
from evidence.methods import TEXTS, find_methods
from evidence.results import crossed_interval
from evidence.subjects import FOLDER as SUBJECTS
from evidence.subjects import Subject, find_subjects
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_linear_schedule_with_warmup, set_seed

import hf_compress as hfc
from hf_compress.measuring.measure import device_name, load_model, versions
from hf_compress.measuring.metrics import metric_for
from hf_compress.measuring.quality import example_scores, usable_rows
from hf_compress.recipe.data import DataOptions, RecipeData

STEPS, BATCH, RATE = 50, 32, 3e-4  # of the board's recipes
ROUNDS = Rounds(3, 1)  # speeds are the board's to measure


@dataclass
class Texts:
    """Tokenized texts of a subject, and how they become batches."""

    subject: Subject

    def __post_init__(self):
        data = RecipeData(DataOptions(**self.subject.texts), self.subject.recipe.task)
        model, self.tokenizer = load_model(self.subject.model), data.tokenizer(self.subject.model)
        splits = data.tokenized(self.tokenizer, model.config, measured=True)
        self.collate = data.collator(self.tokenizer)
        self.train, self.test = (usable_rows(splits[name], model) for name in ("train", "test"))

    def batches(self, seed: int) -> DataLoader:
        order = torch.Generator().manual_seed(seed)
        return DataLoader(self.train, BATCH, shuffle=True, generator=order, collate_fn=self.collate, drop_last=True)

    def answers(self, model: PreTrainedModel) -> list[float]:
        metric = metric_for(model, self.test)
        scores = example_scores(model.eval(), self.test, self.collate, metric=metric, batch_size=BATCH)
        return scores[:, metric.total.column].tolist()


def textbrewer(model: PreTrainedModel, texts: Texts, seed: int, *, hidden: bool = False) -> PreTrainedModel:
    """Its `GeneralDistiller`, with the hidden states of the layers as well where asked for."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    set_seed(seed)
    student = hfc.make_student(model, num_hidden_layers=2)
    matches = [
        {"layer_T": theirs, "layer_S": own, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for own, theirs in enumerate((0, 3, 6))
    ]
    config = DistillationConfig(
        temperature=2, hard_label_weight=0.1, kd_loss_weight=0.9, intermediate_matches=matches if hidden else None
    )

    def adaptor(batch, outputs):
        return {"logits": outputs["logits"], "hidden": outputs["hidden_states"], "losses": outputs["loss"]}

    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(output_dir=folder, device="cpu", ckpt_steps=10 * STEPS)
        distiller = GeneralDistiller(training, config, model, student, adaptor, adaptor)
        with distiller:
            distiller.train(
                optimizer, texts.batches(seed), num_steps=STEPS, max_grad_norm=1.0, output_hidden_states=True,
                scheduler_class=get_linear_schedule_with_warmup,
                scheduler_args={"num_warmup_steps": STEPS // 10, "num_training_steps": STEPS},
            )  # fmt: skip
    return student


def quanto(model: PreTrainedModel, texts: Texts, seed: int, *, bits: int) -> PreTrainedModel:
    """Its weights as float ones again: those of 4 bits and fewer cannot be used in `torch.inference_mode`."""
    from optimum import quanto as library

    library.quantize(model, weights=getattr(library, f"qint{bits}"), exclude=["*classifier*", "*pooler*"])
    library.freeze(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, library.nn.QLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features)
            plain.weight.data, plain.bias.data = module.weight.dequantize().detach(), module.bias.detach()
            model.set_submodule(name, plain)
    return model


def torch_pruning(model: PreTrainedModel, texts: Texts, seed: int) -> PreTrainedModel:
    """Half of each layer's neurons by its Taylor importance, on as many texts as `prune` takes."""
    import torch_pruning as library

    taken = 0
    for batch in texts.batches(seed):
        model(**batch).loss.backward()
        taken += BATCH
        if taken >= 256:
            break
    example = {name: value for name, value in batch.items() if name != "labels"}
    graph = library.DependencyGraph().build_dependency(model, example_inputs=example)
    importance = library.importance.GroupTaylorImportance()
    for layer in model.base_model.encoder.layer:
        neurons = layer.intermediate.dense
        group = graph.get_pruning_group(neurons, library.prune_linear_out_channels, list(range(neurons.out_features)))
        least = importance(group).argsort()[: neurons.out_features // 2].tolist()
        graph.get_pruning_group(neurons, library.prune_linear_out_channels, least).prune()
    return model


Peer = Callable[[PreTrainedModel, Texts, int], PreTrainedModel]
PAIRS: dict[str, tuple[Peer, str, bool]] = {  # the peer, the board's method, and whether seeds make a difference
    "TextBrewer, soft targets": (textbrewer, "soft-targets", True),
    "TextBrewer, soft targets and hidden states": (partial(textbrewer, hidden=True), "pkd", True),
    "optimum-quanto, 8 bit weights": (partial(quanto, bits=8), "rtn-8", False),
    "optimum-quanto, 4 bit weights": (partial(quanto, bits=4), "rtn-4", False),
    "optimum-quanto, 2 bit weights": (partial(quanto, bits=2), "rtn-2", False),
    "Torch-Pruning, half of the neurons by Taylor importance": (torch_pruning, "neurons-50", True),
}


class Kept:
    """Answers that were given before, by subject, name and seed: lines of a file."""

    def __init__(self, file: Path):
        self.file, lines = file, file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.known = {tuple(json.loads(line)[:3]): json.loads(line)[3] for line in lines}

    def of(self, subject: str, name: str, seed: int, make: Callable[[], str]) -> str:
        if (key := (subject, name, seed)) not in self.known:
            self.known[key] = make()
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps([*key, self.known[key]]) + "\n")
        return self.known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder with the subjects' data, as of board.py.")
    parser.add_argument("--output", type=Path, default=Path("runs/board"), help="Subjects, cells and results.")
    parser.add_argument("--subject", default="minilm-films")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", type=int, default=TEXTS, help="Texts that a recipe may train on.")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="Folder of folders of methods.")
    parser.add_argument("--subjects", type=Path, default=SUBJECTS, help="Folder of subjects.")
    args = parser.parse_args()
    subject = find_subjects(args.data, args.output, args.subjects)[args.subject]
    methods = find_methods(args.recipes, args.texts)
    fingerprint, texts, kept = subject.prepare()["fingerprint"], Texts(subject), Kept(args.output / "peers.jsonl")
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"{subject.name}; {device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread(s), {told}\n")
    print("| | theirs | ours | theirs less ours |\n|---|--:|--:|--:|")
    for name, (peer, method, draws) in PAIRS.items():
        rows = []
        for seed in args.seeds if draws else args.seeds[:1]:
            cell = Cell(subject, methods[method], seed, args.output, ROUNDS)
            made = partial(peer, load_model(subject.model), texts, seed)
            theirs = kept.of(fingerprint, name, seed, lambda made=made: packed(texts.answers(made())))
            ours = kept.of(fingerprint, method, seed, lambda cell=cell: cell.make()["answers"])
            rows.append([unpacked(answers, len(texts.test)) for answers in (theirs, ours)])
        theirs, ours = torch.tensor(rows, dtype=torch.double).unbind(1)  # (seeds, texts)
        apart = crossed_interval(theirs - ours)
        between = f"{100 * apart.value:+.1f} ({100 * apart.low:+.1f} to {100 * apart.high:+.1f})"
        print(f"| {name} | {theirs.mean():.1%} | {ours.mean():.1%} (`{method}`) | {between} |", flush=True)


if __name__ == "__main__":
    main()
