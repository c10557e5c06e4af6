"""Indices that a file holds are checked before a kernel, MKL or an engine follows them: those do not check."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from scripts.checks.checkpoints import CHECKPOINTS, bert

MADE = {**CHECKPOINTS, "ternary": lambda: hfc.quantize(bert(), 2, grid="ternary", group_size=-1)}


@pytest.mark.parametrize(
    ("kind", "ending", "value", "message"),
    [
        ("packed", ".g_idx", 2, r"g_idx must lie in \[0, 1\], got \[0, 2\]"),
        ("packed", ".g_idx", -1, r"g_idx must lie in \[0, 1\], got \[-1, 1\]"),
        ("cut", ".crow_indices", 2**30, "crow_indices must rise from 0"),
        ("cut", ".crow_indices", -1, "crow_indices must rise from 0"),
        ("cut", ".col_indices", 2**30, r"col_indices must lie in \[0, "),
        ("cut", ".col_indices", -1, r"col_indices must lie in \[0, "),
        ("ternary", ".qweight", -1, "qweight must hold indices below 3, got 3"),
    ],
    ids=["group-above", "group-below", "row-above", "row-below", "column-above", "column-below", "level-above"],
)
def test_an_index_that_points_outside_is_refused_wherever_it_stands(kind, ending, value, message, tmp_path):
    """At each place of the tensor by itself, the first and the last included."""
    model = MADE[kind]()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if name.endswith(ending) and tensor.numel() > 1)
    whole = tensors[name].clone()
    places = range(whole.numel()) if kind != "ternary" else (0, whole.numel() // 2, whole.numel() - 1)
    for place in places:
        tensors[name] = whole.clone()
        tensors[name].view(-1)[place] = torch.tensor(value, dtype=whole.dtype)
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path)
