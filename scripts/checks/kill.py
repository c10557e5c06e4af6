"""Kill a recipe at random moments, start it again until it is done, and compare what it leaves, byte by byte.

    python scripts/checks/kill.py --kills 20

A tiny classifier is fine-tuned, cut, distilled, pruned while it trains, quantized and evaluated, once undisturbed. Then
the same recipe is killed by SIGKILL, each time at a random moment of another part of the undisturbed run's duration,
started again, killed again, until it comes to its end; a few kills for each such run, each in its own folder. Every
file of the final model (weights, config, tokenizer) has to be what the undisturbed run left. Time is the processor time
of the run, so that it passes alike on a busy machine, from the moment when the first stage is named. Linux only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "was", "not", *"abcdefghij"]

ARGUMENTS = ["run", "../recipe.yaml", "--model", "../start", "--data", "../reviews.csv", "--output", "out"]


def training(steps: int) -> dict:
    return {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 2,
            "disable_tqdm": True, "bf16": False, "use_cpu": True}  # fmt: skip


def stages(steps: int) -> list[dict]:
    return [
        {"fine-tune": training(steps)},
        {"prune": {"method": "vocabulary"}},
        {"prune": {"method": "structure", "layers": 0.5, "neurons": 0.25, "scoring_examples": 16}},
        {"distil": {"method": "soft-targets", "teacher": "vocabulary", "hints": "1:2,2:4", **training(steps)}},
        {"prune": {"method": "heads", "sparsity": 0.5, **training(steps)}},
        {"quantize": {"method": "gptq", "bits": 4, "embedding_bits": 8, "calibration_examples": 16}},
        {"evaluate": {"latency_rounds": 2, "throughput_rounds": 2, "sequence_length": 8, "isolate": False}},
    ]


def prepare(folder: Path, steps: int) -> None:
    """Write a random model with a tokenizer, texts that it can learn, and the recipe."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    vocabulary = [*WORDS, *(f"word{i}" for i in range(64 - len(WORDS)))]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(folder / "start")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                        max_position_embeddings=64)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "start")
    rows = [f"the film was {'good' if i % 2 else 'bad'} {'abcdefghij'[i % 10]},{'pos' if i % 2 else 'neg'}"
            for i in range(80)]  # fmt: skip
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    recipe = {"name": "killed", "data": {"max_length": 16}, "stages": stages(steps)}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def processor_seconds(pid: int) -> float | None:
    """What the process has used, None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Run:
    """One start of the recipe in `folder`, with a clock of its processor time since its first stage."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-m", "hf_compress.commands.main", *ARGUMENTS]
        cache = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **cache}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.said: list[str] = []
        self.start: float | None = None
        self.started = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if line.startswith("1/"):
                self.start = processor_seconds(self.process.pid)
                self.started.set()
        self.started.set()

    def stage(self) -> str:
        """What it was at when it ended."""
        named = [line for line in self.said if line[:1].isdigit() and "/" in line[:3]]
        return named[-1] if named else "before the first stage"

    def finish(self) -> float:
        """Wait for its end. Returns the seconds; raises RuntimeError if it failed."""
        seconds = self._watch(until=float("inf"))
        code = self.process.wait()
        self.reader.join()
        if code != 0 or self.start is None:
            raise RuntimeError(f"the recipe ended with code {code}:\n" + "\n".join(self.said[-15:]))
        return seconds

    def kill_after(self, delay: float) -> bool:
        """SIGKILL `delay` seconds after the first stage began. False if it was done before that."""
        if self._watch(until=delay) < delay:
            self.finish()
            return False
        self.process.kill()
        self.process.wait()
        self.reader.join()
        return True

    def _watch(self, until: float) -> float:
        """Wait until its clock shows `until`, or its end. Returns what it showed last."""
        self.started.wait()
        shown = 0.0
        while shown < until and (used := processor_seconds(self.process.pid)) is not None:
            shown = used - (self.start or 0.0)
            time.sleep(0.005)
        return shown


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def moments(kills: int, duration: float, chance: random.Random) -> list[float]:
    """One random moment in each of `kills` equal parts of the duration, in order."""
    return [(part + chance.random()) * duration / kills for part in range(kills)]


def kill_at(folder: Path, times: list[float], chance: random.Random) -> list[tuple[float, str]]:
    """Run with a kill at each of `times`, in order. Returns when and where each was."""
    kills, before = [], 0.0
    for at in times:
        run = Run(folder)
        if not run.kill_after(at - before):
            # done already: a run that only looks at what is there can be killed as well, while it looks
            run = Run(folder)
            if not run.kill_after(chance.random() * 0.2):
                raise RuntimeError("a finished recipe was too quick to be killed; give more --steps.")
        kills.append((at, run.stage()))
        before = at
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="How many in all.")
    parser.add_argument("--kills-per-run", type=int, default=4, help="How often one run is killed before its end.")
    parser.add_argument("--steps", type=int, default=20, help="Of each training.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--keep", type=Path, default=None, help="An empty folder for all that is made, to look at.")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep.resolve()) as place:
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, args.steps)
        undisturbed = Run(folder / "undisturbed")
        duration = undisturbed.finish()
        expected = contents(folder / "undisturbed" / "out" / "model")
        print(f"undisturbed: {duration:.1f} s, {len(expected)} files: {', '.join(expected)}")
        times = moments(args.kills, duration, chance)
        chance.shuffle(times)
        runs = [sorted(times[i : i + args.kills_per_run]) for i in range(0, len(times), args.kills_per_run)]
        different = 0
        for number, chosen in enumerate(runs, 1):
            kills = kill_at(folder / f"killed-{number}", chosen, chance)
            Run(folder / f"killed-{number}").finish()
            for at, stage in kills:
                print(f"run {number}  killed at {at:5.1f} s  {stage}", flush=True)
            wrong = differences(expected, contents(folder / f"killed-{number}" / "out" / "model"))
            print(f"run {number}  {'differs: ' + ', '.join(wrong) if wrong else 'the same files, byte by byte'}")
            different += bool(wrong)
    print(f"{args.kills} kills in {len(runs)} runs: {len(runs) - different} of {len(runs)} ended in the same bytes")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
