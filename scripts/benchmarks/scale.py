"""Measure a teacher cache and a training on one and more processes, and work out what a large run would cost.

    OMP_NUM_THREADS=1 python scripts/benchmarks/scale.py measure --processes 1 2
    python scripts/benchmarks/scale.py cost --utilisation 0.4

`measure` runs a random Llama model on random text: workers that write a cache apart, and `WordLevelTrainer` from that
cache under DDP (gloo), each process with a batch of its own. Efficiency is the speed of n processes over n times that
of one; utilisation is the share of the speed of large matrix products on this machine, for `cost`.

`cost` takes the passes of a token as 2 floating-point operations for each parameter of the teacher, forward, and 6 of
the student, forward and backward, at a stated peak rate and utilisation; what a cache takes from its format, and the
classes among the draws of a prediction from its probabilities, min(1, N p) of each (exact for draws at even distances).

`gradient` compares k largest logits and draws at like bytes, over a vocabulary with Zipf's probabilities and a student
that differs: how far the gradient of one position is from that of the whole distribution, how far its mean over texts
is, and after how many texts with this prediction the noise of the draws is less than the bias of the largest.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_compress as hfc  # noqa: E402
from hf_compress.distillation.losses.divergences import top_k_forward_kl  # noqa: E402
from hf_compress.distillation.teachers.draws import code_bytes, systematic  # noqa: E402
from hf_compress.measuring.measure import device_name, versions  # noqa: E402

TOKEN_BYTES = 1 + 2  # the number of different classes, and the entropy
LOGIT_BYTES, CLASS_BYTES, REST_BYTES = 2, 4, 4  # of the k largest logits in float16, and the mass of the others
H100_FLOPS = 989e12  # dense bfloat16, as its maker states


def top_k_bytes(k: int) -> int:
    return k * (LOGIT_BYTES + CLASS_BYTES) + REST_BYTES


def zipf(classes: int, entropy: float) -> torch.Tensor:
    """p_i ~ i^-s over `classes` with the entropy asked for, in nats, float64."""
    logs = -torch.arange(1, classes + 1, dtype=torch.float64).log()
    low, high = 0.0, 20.0
    for _ in range(60):
        s = (low + high) / 2
        p = (s * logs).softmax(-1)
        low, high = (s, high) if torch.special.entr(p).sum() > entropy else (low, s)
    return p


def drawn_bytes(classes: int, draws: int, entropy: float | None) -> float:
    """Bytes of a token: of a prediction with that entropy, or at most."""
    distinct = draws if entropy is None else float((draws * zipf(classes, entropy)).clamp(max=1).sum())
    return distinct * code_bytes(classes, draws) + TOKEN_BYTES


def cost(args: argparse.Namespace) -> dict:
    rate = args.peak_flops * args.utilisation
    hours = {
        "teacher, once": 2 * args.teacher * args.tokens / rate / 3600,
        "student": 6 * args.student * args.tokens / rate / 3600,
    }
    sizes = {f"{k} largest": float(top_k_bytes(k)) for k in (64, 256)}
    sizes |= {f"{n} draws, {'at most' if h is None else f'entropy {h}'}": drawn_bytes(args.classes, n, h)
              for n in (8, 32, 64) for h in (1.0, 2.0, 3.0, None)}  # fmt: skip
    print(f"{args.tokens:.3g} tokens, {args.teacher:.3g} to {args.student:.3g} parameters, {args.classes} classes, "
          f"{args.peak_flops:.3g} FLOP/s at {args.utilisation:.0%}:")  # fmt: skip
    for name, value in hours.items():
        print(f"  {name:<28}{value:10.1f} GPU hours")
    speed = rate / (6 * args.student)  # tokens a GPU trains on in a second
    for name, value in sizes.items():
        print(f"  {name:<28}{value:8.1f} bytes a token {value * args.tokens / 2**30:10.1f} GiB"
              f"{value * speed / 2**20:8.2f} MiB/s a GPU")  # fmt: skip
    gradients = 2 * 4 * args.student  # an all-reduce sends and receives each gradient about twice, in float32
    print(f"  gradients{'':<19}{gradients / 2**30:8.1f} GiB a step and GPU, DDP in float32")
    return {"gpu_hours": hours, "bytes_per_token": sizes}


def gradient(args: argparse.Namespace) -> list[list]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for entropy in (1.0, 2.0, 3.0):
        p = zipf(args.classes, entropy)[None]
        logits = 0.8 * p.log() + torch.randn(p.shape, generator=generator, dtype=torch.float64)
        log_s = logits.log_softmax(-1)
        whole = log_s.exp() - p
        budget = drawn_bytes(args.classes, args.draws, entropy)
        k = max(1, round((budget - REST_BYTES) / (LOGIT_BYTES + CLASS_BYTES)))
        top, classes = p.log().topk(k)
        rest = p.log().scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
        biased = top_k_forward_kl(log_s.clone(), top, classes, rest)[1]
        summed, squared = torch.zeros_like(p), 0.0
        for start in (torch.arange(args.starts).double() + 0.5) / args.starts:
            drawn, counts, _ = systematic(p, start[None], args.draws)
            one = log_s.exp().scatter_add(-1, drawn[None], -(counts.double() / args.draws)[None])
            summed, squared = summed + one, squared + float((one - whole).square().sum())
        size = float(whole.norm())
        bias, noise = float((biased - whole).norm()) / size, (squared / args.starts) ** 0.5 / size
        mean = float((summed / args.starts - whole).norm()) / size
        texts = (noise / bias) ** 2
        rows.append([entropy, budget, k, bias, noise, mean, texts])
        print(f"  entropy {entropy}: {budget:.0f} bytes, {k} largest: bias {bias:.3f}; {args.draws} draws: noise of "
              f"one {noise:.3f}, of their mean {mean:.0e}; less than the bias after {texts:.1f} texts")  # fmt: skip
    return rows


def model_of(args: argparse.Namespace, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=args.classes, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=args.length,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text_of(args: argparse.Namespace) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, args.classes, (args.examples, args.length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


class Clock(TrainerCallback):
    """When the first step ended, and the last."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.time())


def worker(args: argparse.Namespace) -> None:
    """One process of a measurement: prints when it began and ended."""
    data = text_of(args)
    if args.what == "cache":
        teacher = model_of(args, args.layers, 0)
        begin = time.time()
        size = max(1, args.examples // 16)
        options = dict(draws=args.draws, batch_size=args.batch, shard_size=size, worker="env")
        hfc.cache_teacher(teacher, data, args.folder, **options)
        print(json.dumps([begin, time.time()]))
        return
    clock = Clock()
    config = hfc.WordLevelConfig(
        str(args.folder) + "-student", max_steps=args.steps, per_device_train_batch_size=args.batch, use_cpu=True,
        report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    student = model_of(args, max(1, args.layers // 2), 1)
    trainer = hfc.WordLevelTrainer(
        student, config, teacher_model=str(args.folder), train_dataset=data, callbacks=[clock]
    )
    trainer.train()
    print(json.dumps([clock.ends[0], clock.ends[-1]]))


def told_by(command: list[str], number: int, **environment: object) -> list:
    """What each of `number` processes that find each other tells in its last line, as JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(number):
        found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        found = {name: str(value) for name, value in (found | environment).items()}
        started.append(subprocess.Popen(command, env={**os.environ, **found}, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"One of {number} processes failed; what it said stands above.")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def processes(args: argparse.Namespace, number: int, what: str, folder: Path) -> float:
    """Seconds from the first beginning to the last end."""
    options = [f"--{name}={getattr(args, name)}" for name in
               ("classes", "hidden", "layers", "length", "examples", "batch", "steps", "draws")]  # fmt: skip
    ends = told_by([sys.executable, __file__, "worker", f"--what={what}", f"--folder={folder}", *options], number)
    return max(end for _, end in ends) - min(begin for begin, _ in ends)


def measure(args: argparse.Namespace) -> dict:
    tokens = {"cache": args.examples * args.length, "training": (args.steps - 1) * args.batch * args.length}
    parameters = sum(p.numel() for p in model_of(args, args.layers, 0).parameters())
    a = torch.randn(1024, 1024)
    begin = time.perf_counter()
    for _ in range(8):
        a @ a
    products = 8 * 2 * 1024**3 / (time.perf_counter() - begin)
    here = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread a process, {versions()}"
    print(f"{here}; a teacher of {parameters:,} parameters, {args.length} tokens; matrix products "
          f"{products / 1e9:.1f} GFLOP/s")  # fmt: skip
    results = {}
    with tempfile.TemporaryDirectory() as place:
        for what in tokens:
            for number in args.processes:
                folder = Path(place) / (f"cache-{number}" if what == "cache" else f"cache-{args.processes[0]}")
                seconds = processes(args, number, what, folder)
                done = tokens[what] * (number if what == "training" else 1)
                results[f"{what} {number}"] = speed = done / seconds
                efficiency = speed / (number * results[f"{what} {args.processes[0]}"] / args.processes[0])
                used = f", utilisation {2 * parameters * speed / number / products:.2f}" if what == "cache" else ""
                print(f"  {what:<9}{number} processes {speed:10.0f} tokens/s, efficiency {efficiency:.2f}{used}")
        cached = hfc.CachedTeacher(Path(place) / f"cache-{args.processes[0]}")
        print(f"  {cached.bytes_per_token:.1f} bytes a token with {args.draws} draws; at most "
              f"{drawn_bytes(args.classes, args.draws, None):.0f} and the keys and headers")  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("measure", "cost", "gradient", "worker"))
    for name, value in {"classes": 49_152, "hidden": 256, "layers": 4, "length": 128, "examples": 64, "batch": 4,
                        "steps": 8, "draws": 32, "starts": 64}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--what", choices=("cache", "training"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--teacher", type=float, default=7e9, help="parameters")
    parser.add_argument("--student", type=float, default=1.5e9, help="parameters")
    parser.add_argument("--peak_flops", type=float, default=H100_FLOPS)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that a run reaches")
    args = parser.parse_args()
    {"measure": measure, "cost": cost, "gradient": gradient, "worker": worker}[args.verb](args)


if __name__ == "__main__":
    main()
