"""Records that tell of another model: `from_config` builds an ordinary model of a compressed one's config.

Such a model computes with ordinary weights and saves them, but its config still says how the other one was compressed.
"""

from collections.abc import Mapping

from torch import nn

from hf_compress.checkpoint.tensors import Stored, stored_as
from hf_compress.layers.low_rank import LowRank
from hf_compress.model.anatomy import in_features, out_features
from hf_compress.model.record import find_name, read_part, write_part
from hf_compress.surgery.marks import Marked, marked_norm


def is_stale(model: nn.Module, record: Mapping[str, dict], stored: Mapping[str, Stored]) -> bool:
    """Whether the files hold, of all that the record tells of, the weights that `model` has without it.

    model   as the config alone builds it
    record  its three parts
    stored  the headers of the files
    """
    structure = record["structure"]
    recorded = [*record["bits"], *record["sparsity"], *structure.get("shapes", ()), *structure.get("ranks", ())]
    there = {name for name, _ in model.named_modules()}
    names = [name for entry in recorded if (name := find_name(model, entry, there)) is not None]
    if "layers" in structure:
        names.append(marked_norm(model)[0])
    return bool(names) and all(_is_ordinary(model, name, stored) for name in names)


def _is_ordinary(model: nn.Module, name: str, stored: Mapping[str, Stored]) -> bool:
    weight, key = getattr(model.get_submodule(name), "weight", None), f"{name}.weight"
    found = stored_as(model, key, stored) or stored_as(model, model.all_tied_weights_keys.get(key, key), stored)
    return weight is not None and found is not None and found.shape == list(weight.shape)


def forget_stale_structure(model: nn.Module) -> None:
    """Changes `model.config`: of the structure in its record, only what is true of `model` stays."""
    structure = read_part(model.config, "structure")
    there = {name for name, _ in model.named_modules()}
    modules = {entry: model.get_submodule(name) for part in structure.values() for entry in part
               if (name := find_name(model, entry, there)) is not None}  # fmt: skip
    for entry, shape in list(structure.get("shapes", {}).items()):
        if entry in modules and shape != [out_features(modules[entry]), in_features(modules[entry])]:
            del structure["shapes"][entry]
    for entry, attributes in list(structure.get("attributes", {}).items()):
        if entry in modules and any(getattr(modules[entry], name, None) != value for name, value in attributes.items()):
            del structure["attributes"][entry]
    for part in ("ranks", "shared"):
        for entry in list(structure.get(part, {})):
            if entry in modules and not isinstance(modules[entry], LowRank):
                del structure[part][entry]
    if "layers" in structure and not any(isinstance(module, Marked) for module in model.modules()):
        del structure["layers"]
    write_part(model.config, "structure", {key: value for key, value in structure.items() if value})
