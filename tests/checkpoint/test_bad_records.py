"""What a file says is checked before it is used: a crafted or broken record is an error, never a wrong model."""

import json

import pytest
from helpers import TASKS, tiny_model

import hf_compress  # noqa: F401  registers the loader
from hf_compress.surgery import prune_heads, prune_neurons

QUERY, KEY, VALUE, OUTPUT = (
    f"encoder.layer.0.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")
)
SELF = "encoder.layer.0.attention.self"


def shapes(**changes):
    return lambda structure: structure["shapes"].update({globals()[name]: shape for name, shape in changes.items()})


def attributes(**changes):
    return lambda structure: structure["attributes"].setdefault(SELF, {}).update(changes)


def remove(key):
    return lambda structure: structure.pop(key)


BROKEN = {
    "unknown-key": (lambda s: s.update(code="print(1)"), r"unknown entries \['code'\]"),
    "unknown-module": (lambda s: s["shapes"].update({"layer.9": [1, 1]}), "has no module .layer.9."),
    "no-linear": (lambda s: s["shapes"].update({"embeddings.LayerNorm": [1, 1]}), "no linear map of a layer"),
    "not-in-a-layer": (lambda s: s["shapes"].update({"classifier": [1, 32]}), "no linear map of a layer"),
    "larger-than-the-config": (shapes(QUERY=[64, 32]), r"beyond the \[32, 32\]"),
    "negative": (shapes(QUERY=[-8, 32]), "must be two sizes"),
    "no-number": (shapes(QUERY=["24", 32]), "must be two sizes"),
    "boolean": (shapes(QUERY=[True, 32]), "must be two sizes"),
    "three-sizes": (shapes(QUERY=[24, 32, 1]), "must be two sizes"),
    "shapes-no-mapping": (lambda s: s.update(shapes=[1]), "must be a mapping"),
    "query-alone": (shapes(QUERY=[16, 32]), "do not fit each other|not a model that can be read"),
    "half-a-head": (shapes(QUERY=[12, 32], KEY=[12, 32], VALUE=[12, 32], OUTPUT=[32, 12]), "do not fit each other"),
    "other-width": (shapes(OUTPUT=[24, 24]), "not a model that can be read|works on widths"),
    "attribute-not-in-the-list": (attributes(forward=3), r"unknown entries \['forward'\]"),
    "attribute-of-another-family": (attributes(split_size=3), "has no attribute 'split_size'"),
    "attribute-no-size": (attributes(num_attention_heads="3"), "must be a size"),
    "attribute-contradicts-the-weights": (attributes(num_attention_heads=2), "contradicts its weights"),
    "attribute-missing": (remove("attributes"), "contradicts its weights"),
    "attribute-of-no-layer": (lambda s: s["attributes"].update({"embeddings": {"layer_idx": 1}}), "has no attribute"),
    "slot-of-no-layer": (attributes(layer_idx=4), "not one of its 4 layers"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model = prune_neurons(prune_heads(tiny_model("bert"), {0: [1], 2: [0, 3]}), {1: [0]})
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_structure_is_refused(folder, change, message):
    rewrite(folder, lambda record: change(record["structure"]))
    with pytest.raises(ValueError, match=message):
        TASKS["classification"].from_pretrained(folder)


def test_shapes_that_contradict_the_tensors_are_refused(folder):
    """A consistent story, but not that of the file."""
    change = shapes(QUERY=[16, 32], KEY=[16, 32], VALUE=[16, 32], OUTPUT=[32, 16])
    rewrite(folder, lambda record: change(record["structure"]))
    rewrite(folder, lambda record: attributes(num_attention_heads=2, all_head_size=16)(record["structure"]))
    with pytest.raises(ValueError, match=r"output\.dense.*\[32, 16\].*\[32, 24\]"):
        TASKS["classification"].from_pretrained(folder)


@pytest.mark.parametrize("change, message", [
    (lambda r: r.update(version=2), "version 2"),
    (lambda r: r.update(extra={}), r"unknown entries \['extra'\]"),
    (lambda r: r.update(structure=[1]), "structure must be a mapping"),
], ids=["version", "part", "type"])  # fmt: skip
def test_a_record_of_another_version_is_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        TASKS["classification"].from_pretrained(folder)


def test_compressing_while_loading_is_refused(tmp_path):
    from hf_compress.checkpoint.loader import HfCompressConfig

    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Load the model first"):
        TASKS["classification"].from_pretrained(tmp_path, quantization_config=HfCompressConfig())
