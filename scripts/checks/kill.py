"""Kill what writes at random moments, start it again until it is done, and compare what it leaves, byte by byte.

    python scripts/checks/kill.py --kills 200                     # shared out over the jobs
    python scripts/checks/kill.py --jobs cache gptq --kills 80

Each job runs once undisturbed, in a folder of its own, and then in others, where it is killed and started again, a few
times, and left to end. Every other kill comes after a random share of the processor time that the undisturbed run took,
so that it passes alike on a busy machine; the others at a random operation on a file of the folder. After each kill
what the job makes is, whole, what it was before or what it becomes; at the end it is what the undisturbed run left, and
files of the user beside it, and what was read, are what they were. Starts are forks of this process, which imported all
there is to import. Linux only.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast  # noqa: E402

import hf_compress as hfc  # noqa: E402
from hf_compress.commands import convert, publish, run  # noqa: E402
from hf_compress.files.output import MANIFEST  # noqa: E402
from hf_compress.files.whole import REPLACED, whole_folder  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "was", "not", *"abcdefghij"]
MINE = "mine.txt"  # a file of the user
MOST_KILLS = 4  # of one run
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


@dataclass(frozen=True)
class Job:
    """What works in `folder/out`, with what lies in `folder.parent`, and goes on with what it finds there."""

    run: Callable[[Path], None]
    results: str  # what has to be the same at the end, as a pattern
    is_whole: bool = True  # the results come and go together
    begin: Callable[[Path], None] | None = None  # leaves what is to be replaced


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
    """Write what the jobs read: a random model and its packed form, texts, recipes, a report."""
    vocabulary = [*WORDS, *(f"word{i}" for i in range(64 - len(WORDS)))]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                        max_position_embeddings=64)  # fmt: skip
    model = BertForSequenceClassification(config)
    for name in ("start", "packed"):
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
        if name == "start":
            hfc.quantize(model, 4, symmetric=True, group_size=32)
    texts = [f"the film was {'good' if i % 2 else 'bad'} {'abcdefghij'[i % 10]},{'pos' if i % 2 else 'neg'}"
             for i in range(80)]  # fmt: skip
    (folder / "reviews.csv").write_text("\n".join(["text,label", *texts]) + "\n", encoding="utf-8")
    for name, listed in (("recipe", stages(steps)), ("before", [{"fine-tune": training(2)}, *stages(steps)[1:2]])):
        recipe = {"name": "killed", "data": {"max_length": 16}, "stages": listed}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    quick = {"sequence_length": 8, "latency_rounds": 2, "throughput_rounds": 2}
    hfc.compare({"packed": str(folder / "packed")}, **quick).save(folder / "report")


def rows(number: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(5, 64, (4 + i % 9,), generator=generator).tolist()} for i in range(number)]


def opened(folder: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(folder.parent / "start")


def options(given: dict[str, object]) -> list[str]:
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def recipe(folder: Path, name: str = "recipe.yaml") -> None:
    given = {"model": folder.parent / "start", "data": folder.parent / "reviews.csv", "output": folder / "out"}
    run.run("run", [str(folder.parent / name), *options(given)])


def cache(folder: Path) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(folder.parent / "start")
    hfc.cache_teacher(opened(folder), rows(96), folder / "out", shard_size=8, batch_size=4, hidden_states=[2],
                      processing_class=tokenizer)  # fmt: skip


def gptq(folder: Path) -> None:
    if (folder / "out").is_dir():  # the kill came after all was done
        return
    model = hfc.quantize(opened(folder), 4, method="gptq", calibration=rows(32), resume_dir=str(folder / "resume"))
    with whole_folder(folder / "out") as place:
        model.save_pretrained(place)


def publication(folder: Path, licence: str = "mit") -> None:
    given = {"repo_id": "me/killed", "dry_run": "true", "license": licence, "report": folder.parent / "report",
             "keep": folder / "out"}  # fmt: skip
    publish.run("publish", [str(folder.parent / "packed"), *options(given)])


def save(folder: Path) -> None:
    if not (folder / "out").is_dir():
        convert.run("convert", [str(folder.parent / "packed"), str(folder / "out"), "--format", "gptq"])


JOBS = {
    "recipe": Job(recipe, "out/model/*", begin=lambda folder: recipe(folder, "before.yaml")),
    "cache": Job(cache, "out/*.safetensors", is_whole=False),
    "gptq": Job(gptq, "out/*"),
    "publish": Job(publication, "out/**/*", is_whole=False, begin=lambda folder: publication(folder, "apache-2.0")),
    "save": Job(save, "out/*"),
}


def own_locks(kind: type[tqdm]) -> None:
    """The lock of progress bars is shared with forks: one that was killed would hold it for ever."""
    kind.set_lock(threading.RLock())
    for inherited in kind.__subclasses__():
        own_locks(inherited)


def start(work: Callable[[Path], None], folder: Path, *, seconds: float = 0.0, operation: int = 0) -> tuple:
    """`work(folder)` in a fork, killed after `seconds` of processor time or at its nth `operation` on a file.

    Returns whether it was killed, its seconds, its operations. Raises RuntimeError for what it raises.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status, count = 1, 0

        def watch(event: str, args: tuple) -> None:
            nonlocal count
            if event in OPERATIONS and str(args[0]).startswith(str(folder)):
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            with (folder / "log").open("w", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            own_locks(tqdm)
            sys.addaudithook(watch)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends a process as abruptly
            signal.setitimer(signal.ITIMER_PROF, seconds)
            work(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(writing, str(count).encode())
            os._exit(status)
    os.close(writing)
    _, status, usage = os.wait4(child, 0)
    count = int(os.read(reading, 100) or 0)
    os.close(reading)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGPROF)
    if status and not killed:
        raise RuntimeError(f"{folder.name} failed:\n{(folder / 'log').read_text(encoding='utf-8')[-2000:]}")
    return killed, usage.ru_utime + usage.ru_stime, count


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    files = [file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name != MINE}


def made(job: Job, folder: Path) -> dict[str, bytes]:
    """The results that are there; of a folder that is being replaced, what the next start puts back."""
    place = folder / Path(job.results).parent.as_posix().rstrip("/*")
    found = contents(folder, job.results)
    aside = place.with_name(REPLACED + place.name)
    if job.is_whole and not place.exists() and aside.exists():
        return {str(Path(job.results).parent / file): data for file, data in contents(aside).items()}
    return found


def complaint(job: Job, found: dict, old: dict, new: dict) -> str | None:
    """What is wrong with the results after a kill; None for the old ones or the new ones."""
    if job.is_whole:
        return None if found in (old, new) else f"{differences(new, found)} are neither the old ones nor the new ones"
    others = [name for name, data in found.items() if data not in (old.get(name), new.get(name))]
    lost = [name for name in old if name not in found]
    return f"{others} are torn, {lost} are lost" if others or lost else None


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def leave_mine(folder: Path) -> None:
    """The user puts files beside what we make."""
    for place in (folder, folder / "out"):
        if place == folder or (place / MANIFEST).is_file():
            (place / MINE).write_text("mine", encoding="utf-8")


def kill(name: str, kills: int, place: Path, chance: random.Random) -> list[str]:
    """Kill job `name` that often. Prints a line; returns the complaints."""
    job, complaints, done, runs = JOBS[name], [], 0, 0

    def begun(which: str) -> tuple[Path, dict]:
        folder = place / f"{name}-{which}"
        folder.mkdir()
        if job.begin is not None:
            start(job.begin, folder)
        leave_mine(folder)
        return folder, made(job, folder)

    folder, old = begun("undisturbed")
    _, seconds, operations = start(job.run, folder)
    new = made(job, folder)
    print(f"{name}: {seconds:.1f} s, {operations} operations, {len(new)} files undisturbed", flush=True)
    while done < kills:
        runs += 1
        folder, _ = begun(str(runs))
        for _ in range(min(MOST_KILLS, kills - done)):
            after, at = chance.random() * seconds, 1 + chance.randrange(operations)
            moment = {"operation": at} if done % 2 else {"seconds": after}
            killed, _, _ = start(job.run, folder, **moment)
            if (wrong := complaint(job, made(job, folder), old, new)) is not None:
                complaints.append(f"{name} {runs}, killed at {moment}: {wrong}")
            leave_mine(folder)
            if not killed:  # it was done before
                break
            done += 1
        start(job.run, folder)
        if wrong := differences(new, made(job, folder)):
            complaints.append(f"{name} {runs} ended in others: {wrong}")
        mine = [file.read_text(encoding="utf-8") for file in folder.rglob(MINE)]
        if set(mine) != {"mine"} or len(mine) != 1 + (folder / "out" / MANIFEST).is_file():
            complaints.append(f"{name} {runs}: files of the user are gone")
    print(f"{name}: {done} kills in {runs} runs, {len(complaints)} complaints", flush=True)
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="How many in all.")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--steps", type=int, default=20, help="Of each training of the recipe.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--keep", type=Path, default=None, help="An empty folder for all that is made, to look at.")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no others
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep.resolve()) as name:
        place = Path(name)
        place.mkdir(parents=True, exist_ok=True)
        prepare(place, args.steps)
        read, complaints = contents(place), []
        for number, job in enumerate(args.jobs):
            share = args.kills // len(args.jobs) + (number < args.kills % len(args.jobs))
            complaints += kill(job, share, place, random.Random(f"{args.seed}-{job}"))
        if changed := [name for name, data in read.items() if (place / name).read_bytes() != data]:
            complaints.append(f"what was read is not what it was: {changed}")
    print("\n".join([*complaints, f"{args.kills} kills, seed {args.seed}: {len(complaints)} complaints"]))
    return int(bool(complaints))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
