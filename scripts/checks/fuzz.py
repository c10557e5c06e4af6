"""Damage compressed checkpoints at random, load them, and see that nothing but the right tensors or an error comes out.

    python scripts/checks/fuzz.py --count 10000 --seed 0

A mutation is made from (seed, number) alone, so `--only 4711` makes one again. Each ends in a model whose tensors are,
byte for byte, what the file holds under their names, or in a ValueError or OSError (or in Transformers' own errors for
what is its own: tensors of another shape, and fields of config.json that are not ours). What else may happen is told:
other errors, code that ran, attributes that no undamaged module has, more than MOST_SECONDS of processor time or
MOST_BYTES of memory for one load. Every 250 loads run in a process of their own, so that a crash is told too.
"""

import argparse
import copy
import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

import hf_compress as hfc

MOST_SECONDS = 5.0  # a load of these models takes about 0.02
MOST_BYTES = 256 * 2**20  # beyond what the process has had before
MOST_ADDRESSES = 2 * 2**30  # beyond what the process begins with: more is refused by the system, so that it can be told
PER_PROCESS = 250
ODD = (None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**30, 1.5, 4.0, float("nan"), "", "abc", "4", "forward",
       "__class__", "../x", [], {}, [1], [16, 16], [0, 0, 0], {"bits": 4}, ["x"] * 5)  # fmt: skip
PLAIN_FIELDS = {  # of any config.json: values that Transformers builds a model from, or refuses
    "hidden_size": (16, 48, 0, "x"), "intermediate_size": (16, 96, -1), "num_attention_heads": (1, 3, 8),
    "num_hidden_layers": (0, 1, 3), "vocab_size": (32, 128, 0), "model_type": ("gpt2", "nothing", 3),
    "architectures": (["BertModel"], ["os"], [], "x"), "dtype": ("float16", "bfloat16", "int8", "x"),
    "hidden_act": ("relu", "x", "__import__"), "transformers_weights": ("evil.bin", "../evil.bin"),
}  # fmt: skip
EVIL = "import pathlib\npathlib.Path({!r}).write_text('ran')\nclass Evil: pass\n"


def bert(**changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                 max_position_embeddings=32)  # fmt: skip
    return BertForSequenceClassification(BertConfig(**sizes, **changes)).eval()


def packed():
    """2, 3, 4 and 8 bit, act-order, activation bits and an embedding."""
    layer = "bert.encoder.layer.0"
    bits = {f"{layer}.attention.self.query": 2, f"{layer}.attention.self.key": 3, f"{layer}.attention.self.value": 4,
            f"{layer}.output.dense": 8, "bert.embeddings.word_embeddings": 4}  # fmt: skip
    model = hfc.quantize(bert(), bits, group_size=16)
    record = copy.deepcopy(model.config.quantization_config)
    record["bits"]["encoder.layer.0.attention.self.query"]["desc_act"] = True
    record["bits"]["encoder.layer.0.output.dense"].update(activation_bits=8, activation_range=[-2.0, 3.0])
    query = model.bert.encoder.layer[0].attention.self.query
    query.g_idx = torch.arange(32, dtype=torch.int32) // 16
    model.config.quantization_config = record
    return model


def codebook():
    return hfc.quantize(bert(), 3, grid="kmeans", group_size=-1)


def cut():
    """Structure: heads and neurons gone, a table in two factors, blocks."""
    model = hfc.prune_neurons(hfc.prune_heads(bert(), {0: [1, 2]}), {0: range(32)})
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:16, :16] = 0
        layer.attention.self.query.weight[:, 16:] = 0
    return hfc.to_block_sparse(hfc.factorise_embeddings(model, 8), 16)


def layers():
    """Layers of a deeper model."""
    torch.manual_seed(0)
    config = ModernBertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                              vocab_size=64, max_position_embeddings=64, pad_token_id=0, cls_token_id=1, sep_token_id=2,
                              local_attention=8, global_attn_every_n_layers=2)  # fmt: skip
    return hfc.prune_layers(ModernBertForSequenceClassification(config).eval(), keep=[1, 2])


CHECKPOINTS = {"packed": packed, "codebook": codebook, "cut": cut, "layers": layers}


class Checkpoint:
    """An undamaged checkpoint in memory, and what its modules look like."""

    def __init__(self, name: str, folder: Path):
        model = CHECKPOINTS[name]()
        model.save_pretrained(folder)
        self.name, self.kind = name, type(model)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights = (folder / "model.safetensors").read_bytes()
        loaded = self.kind.from_pretrained(folder)
        compare(loaded, folder)
        self.attributes = attributes(loaded)


def attributes(model) -> set[tuple[str, str]]:
    return {(type(module).__name__, name) for module in model.modules() for name in vars(module)}


# Mutations: each takes a random generator and the folder's parts, and changes them


def places(tree, path=()):
    """Every path into a tree of JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def parent(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree, path[-1]


def change_record(rng, config, weights, marker):
    """One place of the record: taken away, renamed, given an odd value, or that of another place."""
    record = config["quantization_config"]
    found = [p for p in places(record)]
    holder, key = parent(record, rng.choice(found))
    other, other_key = parent(record, rng.choice(found))
    value = copy.deepcopy(other[other_key])
    action = rng.choice(("delete", "odd", "odd", "odd", "other", "rename", "number", "number"))
    if action == "delete":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", "forward", "__class__", "encoder", "", str(other_key)))] = holder.pop(key)
    elif action == "number" and type(holder[key]) in (int, float):
        holder[key] = rng.choice((holder[key] * 2, holder[key] // 2, holder[key] + 1, holder[key] - 1, -holder[key]))
    else:
        holder[key] = value if action == "other" else rng.choice(ODD)
    return weights


def change_plain_field(rng, config, weights, marker):
    name = rng.choice(sorted(PLAIN_FIELDS))
    config[name] = rng.choice(PLAIN_FIELDS[name])
    return weights


def ask_for_code(rng, config, weights, marker):
    """The record, or the config, names code that lies beside the weights."""
    where = rng.choice((config, config["quantization_config"]))
    where["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Evil"}
    where[rng.choice(("_attn_implementation", "attn_implementation", "custom_pipelines", "kernel"))] = "evil.Evil"
    return weights


def change_header(rng, config, weights, marker):
    """One tensor's name, kind of number, shape or place in the header."""
    size = int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    names = [n for n in header if n != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    action = rng.choice(("dtype", "shape", "offsets", "swap", "rename", "delete", "odd"))
    if action == "dtype":
        header[name]["dtype"] = rng.choice(("I32", "F32", "F16", "BF16", "I64", "U8", "I8", "BOOL", "F64", "X9"))
    elif action == "shape":
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice((shape[::-1], [1, *shape], [n * 2 for n in shape], [], [2**62, 4], [-1]))
    elif action == "offsets":
        header[name]["data_offsets"] = rng.choice(([0, 4], [0, 2**60], [-4, 4], [8, 4], header[other]["data_offsets"]))
    elif action == "swap":
        header[name]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[name]["data_offsets"],
        )
        if rng.random() < 0.5:  # a whole description: the same tensor under another name
            header[name], header[other] = header[other], header[name]
    elif action == "rename":
        header[rng.choice((f"{name}x", name.replace("bert.", ""), "forward", ""))] = header.pop(name)
    elif action == "delete":
        del header[name]
    else:
        header[name] = rng.choice((None, [], {}, 3, {"dtype": "F32"}))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def change_bytes(rng, config, weights, marker):
    """Bytes of the file: cut, longer, others, or a run of ones, which is NaN and the largest of all indices."""
    data, place = bytearray(weights), rng.randrange(len(weights))
    action = rng.choice(("cut", "longer", "flip", "ones", "length"))
    if action == "cut":
        del data[place:]
    elif action == "longer":
        data += bytes(rng.randrange(1, 64))
    elif action == "flip":
        for _ in range(rng.randrange(1, 64)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif action == "ones":
        data[place : place + 64] = b"\xff" * len(data[place : place + 64])
    else:
        data[:8] = rng.choice((2**63, 2**31, len(data), 0, 1)).to_bytes(8, "little")
    return bytes(data)


def change_values(rng, config, weights, marker):
    """The values of one tensor, of those that index others with preference."""
    size = int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8 : 8 + size]), bytearray(weights)
    names = [n for n in header if n != "__metadata__" and n.rpartition(".")[2] != "weight"]
    start, end = header[rng.choice(names)]["data_offsets"]
    for i in range(8 + size + start, 8 + size + end):
        data[i] = rng.randrange(256)
    return bytes(data)


def swap_in_a_pickle(rng, config, weights, marker):
    """Instead of safetensors, a pickle that runs code when it is opened; `damage` writes it."""


MUTATIONS = {change_record: 8, change_header: 5, change_bytes: 3, change_values: 2, change_plain_field: 2,
             ask_for_code: 1, swap_in_a_pickle: 0.3}  # fmt: skip


class Bomb:
    """What a hostile pickle does."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "ran")


def damage(checkpoint: Checkpoint, seed: int, number: int, folder: Path, marker: Path) -> str:
    """Writes the damaged checkpoint into `folder`; returns what was done to it."""
    rng = random.Random(f"{seed}-{number}")
    config, weights = copy.deepcopy(checkpoint.config), checkpoint.weights
    mutation = rng.choices(list(MUTATIONS), weights=list(MUTATIONS.values()))[0]
    weights = mutation(rng, config, weights, marker)
    text = json.dumps(config).encode()
    if rng.random() < 0.02:  # the text itself
        text = text[: rng.randrange(len(text))]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_bytes(text)
    (folder / "evil.py").write_text(EVIL.format(str(marker)), encoding="utf-8")
    if weights is None or "transformers_weights" in config:
        for name in ("pytorch_model.bin", "evil.bin"):
            torch.save(Bomb(marker), folder / name)
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return mutation.__name__


def compare(model, folder: Path) -> None:
    """Raise AssertionError for a tensor of `model` that is not, byte for byte, what the file holds under its name."""
    stored = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if tensor.numel() == 1 and name.endswith(".weight"):  # a sentinel, see hf_compress.layers.sentinel
            continue
        key = name if name in stored else name.removeprefix(f"{model.base_model_prefix}.")
        assert key in stored, f"{name} is not in the file, but in the model"
        expected = stored[key].to(tensor.dtype)
        is_same = tensor.shape == expected.shape and bool((tensor == expected).all())
        assert is_same, f"{name} is not what the file holds"


def is_expected(error: Exception, mutation: str, folder: Path) -> bool:
    """Whether a reader of damaged files may raise it. Of a record that is not ours, Transformers tells as it likes."""
    if isinstance(error, (ValueError, OSError)):
        return True
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = any("/hf_compress" in frame.filename for frame in frames)
    names_us = '"quant_method": "hf_compress"' in (folder / "config.json").read_text(encoding="utf-8")
    return (mutation in ("change_plain_field", "ask_for_code") or not names_us) and not is_ours


def attempt(checkpoint: Checkpoint, seed: int, number: int, folder: Path) -> tuple[str, str | None]:
    """How one damaged checkpoint ends: what was done and what came of it; and a complaint, if there is one."""
    marker = folder.with_name("ran")
    mutation = damage(checkpoint, seed, number, folder, marker)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, complaint = time.process_time(), None
    try:
        model = checkpoint.kind.from_pretrained(folder)
        end = "loads"
        if mutation not in ("change_plain_field", "ask_for_code"):
            compare(model, folder)
        kinds = {kind for kind, _ in checkpoint.attributes}  # another `hidden_act` brings another kind
        if unknown := {a for a in attributes(model) - checkpoint.attributes if a[0] in kinds}:
            complaint = f"attributes from outside: {sorted(unknown)[:5]}"
        with torch.no_grad():
            model(input_ids=torch.arange(12).reshape(2, 6))
    except AssertionError as error:
        end, complaint = "wrong tensors", str(error)
    except Exception as error:  # which it is, is the question
        end = type(error).__name__
        if not is_expected(error, mutation, folder):
            complaint = "".join(traceback.format_exception(error))[-1500:]
    seconds = time.process_time() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024
    if marker.exists():
        complaint = "code from the checkpoint ran"
        marker.unlink()
    if seconds > MOST_SECONDS or memory > MOST_BYTES:
        complaint = f"{seconds:.1f} s of processor time, {memory / 2**20:.0f} MiB more memory"
    return f"{mutation}: {end}", complaint


def fuzz(numbers: range, seed: int, folder: Path) -> tuple[Counter, dict[int, str]]:
    """How often each end was met, and the complaints by number."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    checkpoints = [Checkpoint(name, folder / name) for name in CHECKPOINTS]
    ends, complaints = Counter(), {}
    for number in numbers:
        (folder / "number").write_text(str(number), encoding="utf-8")
        end, complaint = attempt(checkpoints[number % len(checkpoints)], seed, number, folder / "damaged")
        ends[end] += 1
        if complaint is not None:
            complaints[number] = f"{checkpoints[number % len(checkpoints)].name}, {end}: {complaint}"
    return ends, complaints


def fuzz_apart(numbers: range, seed: int) -> tuple[Counter, dict[int, str]]:
    """`fuzz` in a process of its own, whose death is a complaint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                limit = (
                    int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
                    + MOST_ADDRESSES
                )
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                ends, complaints = fuzz(numbers, seed, folder)
                (folder / "result").write_text(json.dumps([ends, complaints]), encoding="utf-8")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            return Counter(), {
                int((folder / "number").read_text(encoding="utf-8")): f"the process ended with status {status}"
            }
        ends, complaints = json.loads((folder / "result").read_text(encoding="utf-8"))
        return Counter(ends), {int(number): text for number, text in complaints.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one number, in this process")
    run = parser.parse_args()
    torch.set_num_threads(1)
    start, ends, complaints = time.time(), Counter(), {}
    if run.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            ends, complaints = fuzz(range(run.only, run.only + 1), run.seed, Path(folder))
    else:
        for first in range(0, run.count, PER_PROCESS):
            more, wrong = fuzz_apart(range(first, min(first + PER_PROCESS, run.count)), run.seed)
            ends += more
            complaints |= wrong
    for end, count in sorted(ends.items()):
        print(f"{count:6d}  {end}")
    for number, complaint in complaints.items():
        print(f"\n{number}: {complaint}")
    print(
        f"\n{sum(ends.values())} mutations, seed {run.seed}: {len(complaints)} complaints, {time.time() - start:.0f} s"
    )
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
