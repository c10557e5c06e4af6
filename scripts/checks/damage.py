"""What may happen to a checkpoint on its way: mutations of its config, of the header and of the bytes of its weights.

Each takes a random generator, the config (which it may change), the bytes of the weights, and the file whose presence
tells that code ran. It returns the weights, or None where a pickle takes their place.
"""

import copy
import json
import random
import shutil
from pathlib import Path

import torch

ODD = (None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**30, 1.5, 4.0, float("nan"), "", "abc", "4", "forward",
       "__class__", "../x", [], {}, [1], [16, 16], [0, 0, 0], {"bits": 4}, ["x"] * 5)  # fmt: skip
PLAIN_FIELDS = {  # of any config.json: values that Transformers builds a model from, or refuses
    "hidden_size": (16, 48, 0, "x"), "intermediate_size": (16, 96, -1), "num_attention_heads": (1, 3, 8),
    "num_hidden_layers": (0, 1, 3), "vocab_size": (32, 128, 0), "model_type": ("gpt2", "nothing", 3),
    "architectures": (["BertModel"], ["os"], [], "x"), "dtype": ("float16", "bfloat16", "int8", "x"),
    "hidden_act": ("relu", "x", "__import__"), "transformers_weights": ("evil.bin", "../evil.bin"),
}  # fmt: skip
EVIL = "import pathlib\npathlib.Path({!r}).write_text('ran')\nclass Evil: pass\n"


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


def damage(config: dict, weights: bytes, rng: random.Random, folder: Path, marker: Path) -> list[str]:
    """Writes the damaged checkpoint into `folder`; returns what was done to it, one thing or two."""
    config, done = copy.deepcopy(config), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        if weights is not None:
            mutation = rng.choices(list(MUTATIONS), weights=list(MUTATIONS.values()))[0]
            try:
                weights = mutation(rng, config, weights, marker)
            except (
                ValueError,
                KeyError,
                TypeError,
                IndexError,
                UnicodeDecodeError,
            ):  # nothing there to change any more
                continue
            done.append(mutation.__name__)
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
    return done
