"""How often `compare` finds what is there, and what is not there.

    python scripts/benchmarks/compare.py --model runs/classifier-tiny/model --data DIR --output runs/compare-rates

Three times 20 comparisons of a classifier, loaded anew for each: with itself, where neither quality nor speed differ;
with itself made 10% slower, which latency and throughput have to show; with itself made 2 points worse, which the
accuracy has to show. Slower: each forward is followed by a wait of a tenth of what it took. Worse: of the sentences of
the validation and test files, drawn anew each time, enough answers are turned round that accuracy falls by 2 points,
and as many more that both models differ on a tenth of the sentences, as a compressed model and its teacher do.

Each comparison is a line of results.jsonl, timings included; what is there is not run again. `--power` needs no model:
it says how often the test finds a loss of 2 points on average, for other sizes of the test set and other overlaps.
"""

import argparse
import functools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from datasets import concatenate_datasets
from transformers import AutoTokenizer, PreTrainedModel

import hf_compress as hfc
from hf_compress.measuring.measure import load_model
from hf_compress.measuring.metrics import accuracy
from hf_compress.measuring.quality import example_scores, padding_collator, usable_rows
from hf_compress.measuring.significance import mcnemar_p_value
from hf_compress.recipe.texts import load_texts, tokenize

KINDS = ("same", "slower", "worse")
LOSS = 0.02  # of accuracy
DISCORDANT = 0.10  # share of sentences on which both models differ, where one was made worse


def slow_down(model: PreTrainedModel, share: float) -> None:
    """Let each forward take `share` longer than it takes."""
    forward = model.forward

    @functools.wraps(forward)
    def slower(*args, **kwargs):
        start = time.perf_counter()
        outputs = forward(*args, **kwargs)
        end = start + (1 + share) * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return outputs

    model.forward = slower


def turn_round(model: PreTrainedModel, chosen: set[tuple[int, ...]]) -> None:
    """Let the model of two classes answer the other one for the sentences `chosen`, given as their tokens."""

    def turn(module, args, kwargs, outputs):
        for i, (tokens, real) in enumerate(zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)):
            if tuple(tokens[real.bool()].tolist()) in chosen:
                outputs.logits[i] = outputs.logits[i].flip(0)
        return outputs

    model.register_forward_hook(turn, with_kwargs=True)


def sentences_to_turn(rows: list[dict], right: torch.Tensor, chance: random.Random) -> set[tuple[int, ...]]:
    """So many of the right answers and of the wrong ones that accuracy falls by `LOSS` and `DISCORDANT` differ."""
    tokens = [tuple(row["input_ids"]) for row in rows]
    number = Counter(tokens)
    once = [i for i in range(len(rows)) if number[tokens[i]] == 1]
    lost = round(len(rows) * (DISCORDANT + LOSS) / 2)
    won = lost - round(len(rows) * LOSS)
    chosen = chance.sample([i for i in once if right[i]], lost) + chance.sample([i for i in once if not right[i]], won)
    return {tokens[i] for i in chosen}


def comparison(kind: str, number: int, args: argparse.Namespace, rows: list[dict], right: torch.Tensor) -> dict:
    """One comparison, as plain values."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    reference, other = (load_model(args.model, device="cpu") for _ in range(2))
    how = {"latency_rounds": args.latency_rounds, "throughput_rounds": args.throughput_rounds}
    if kind == "slower":
        slow_down(other, args.slow_down)
    if kind == "worse":
        turn_round(other, sentences_to_turn(rows, right, random.Random(number)))
        how = {"latency_rounds": 6, "throughput_rounds": 6}
    start = time.perf_counter()
    report = hfc.compare({"model": reference, "other": other}, eval_dataset=None if kind == "slower" else rows,
                         processing_class=tokenizer, sequence_length=args.max_length, **how)  # fmt: skip
    base, entry = report.entries
    result = {"kind": kind, "number": number, "seconds": round(time.perf_counter() - start, 1)}
    for name in ("latency", "throughput"):
        interval = getattr(entry, f"{name}_speed_up")
        result[name] = {"verdict": interval.speed_verdict, "value": interval.value, "low": interval.low,
                        "high": interval.high}  # fmt: skip
    if entry.difference:
        interval = entry.difference.interval
        result["quality"] = {"verdict": entry.difference.verdict, "p_value": entry.difference.p_value,
                             "value": interval.value, "low": interval.low, "high": interval.high}  # fmt: skip
    if kind != "worse":
        result["samples"] = {one.name: {"latency_ms": one.measurement.latency_ms.samples,
                                        "throughput": one.measurement.throughput.samples}
                             for one in (base, entry)}  # fmt: skip
    return result


def is_as_it_should_be(result: dict) -> bool:
    speeds = [result[name]["verdict"] for name in ("latency", "throughput")]
    if result["kind"] == "slower":
        return speeds == ["worse", "worse"]
    if result["kind"] == "worse":
        return result["quality"]["verdict"] == "worse"
    return speeds == ["no difference"] * 2 and result["quality"]["verdict"] == "no difference"


def table(results: list[dict]) -> str:
    lines = []
    for kind in KINDS:
        found = [result for result in results if result["kind"] == kind]
        if not found:
            continue
        lines.append(f"{kind}: {sum(map(is_as_it_should_be, found))} of {len(found)} comparisons say so")
        for name in ("latency", "throughput") if kind != "worse" else ("quality",):
            values = torch.tensor([[result[name][key] for key in ("value", "low", "high")] for result in found])
            half = ((values[:, 2] - values[:, 1]) / 2).median()
            verdicts = [result[name]["verdict"] for result in found]
            told = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
            lines.append(f"  {name}: {told}; values {values[:, 0].min():.3f} to {values[:, 0].max():.3f}, interval "
                         f"± {half:.3f} (median)")  # fmt: skip
    seconds = sum(result["seconds"] for result in results)
    return "\n".join([*lines, f"{len(results)} comparisons, {seconds:.0f} s"])


def power_table(draws: int = 2000) -> str:
    """How often McNemar's test finds a loss of `LOSS` on average, the sentences of each test set drawn at random."""
    shares, sizes = (0.03, 0.05, 0.08, 0.12, 0.16), (1000, 1500, 2500, 5000)
    lines = ["sentences  " + "  ".join(f"{share:>5.0%} differ" for share in shares)]
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        cells = []
        for share in shares:
            differ = torch.binomial(torch.full((draws,), float(size)), torch.full((draws,), share), generator=generator)
            lost = torch.binomial(differ, torch.full((draws,), (share + LOSS) / (2 * share)), generator=generator)
            counts = zip(lost.int().tolist(), (differ - lost).int().tolist(), strict=True)
            cells.append(sum(p_value(only, other) < 0.05 and only > other for only, other in counts) / draws)
        lines.append(f"{size:>9}  " + "  ".join(f"{cell:>12.0%}" for cell in cells))
    return "\n".join(lines)


@functools.cache
def p_value(only_reference: int, only_candidate: int) -> float:
    reference = torch.tensor([1] * only_reference + [0] * only_candidate)
    return mcnemar_p_value(reference, 1 - reference)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a classifier of two classes, with its tokenizer.")
    parser.add_argument("--data", help="Folder of train, validation and test files with texts and labels.")
    parser.add_argument("--output", type=Path, help="Folder for results.jsonl.")
    parser.add_argument("--runs", type=int, default=20, help="Comparisons of each kind.")
    parser.add_argument("--latency-rounds", type=int, default=200)
    parser.add_argument("--throughput-rounds", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--slow-down", type=float, default=0.10, help="Share that each forward takes longer.")
    parser.add_argument("--power", action="store_true", help="Only the table of what McNemar's test can find.")
    args = parser.parse_args()
    if args.power:
        print(power_table())
        return 0
    if not (args.model and args.data and args.output):
        parser.error("--model, --data and --output are needed")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    done = {(result["kind"], result["number"]) for result in results}
    rows, right = None, None
    for number in range(args.runs):
        for kind in KINDS:
            if (kind, number) in done:
                continue
            if rows is None:
                rows, right = sentences(args)
            result = comparison(kind, number, args, rows, right)
            results.append(result)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(result) + "\n")
            print(f"{kind:7}{number:3}  {'as it should be' if is_as_it_should_be(result) else 'WRONG'}  "
                  f"{result['seconds']} s", flush=True)  # fmt: skip
    print(f"\n{table(results)}")
    return 0


def sentences(args: argparse.Namespace) -> tuple[list[dict], torch.Tensor]:
    """The rows of the validation and test files, and whether the model is right on each."""
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), load_model(args.model, device="cpu")
    splits = tokenize(load_texts(args.data), tokenizer, args.max_length)
    rows = usable_rows(concatenate_datasets([splits["validation"], splits["test"]]), model, accuracy)
    collator = padding_collator(rows, tokenizer, model, model.main_input_name)
    return rows, example_scores(model, rows, collator, metric=accuracy, batch_size=32)


if __name__ == "__main__":
    sys.exit(main())
