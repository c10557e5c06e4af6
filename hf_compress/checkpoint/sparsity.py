"""The `sparsity` part of the record: which linear maps are stored in blocks.

    {module: {"format": "bsr", "block_size": [32, 32], "num_blocks": 40}}

The format is "bsr" for floating-point blocks, and "packed" for blocks of a module that the `bits` part names as well.

Rows and columns that became empty are no longer in these shapes: the structure part says what is left of them.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.packed_blocks import PackedBlocksLinear, packed_blocks
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.model.anatomy import in_features, is_plain, out_features
from hf_compress.model.record import find_name, stored_name, write_part

ENTRIES = {"format", "block_size", "num_blocks"}
BLOCK_SIDES = {
    "bsr": (16, 32, 64, 128),  # what the kernels run; finer masks are stored as blocks of 16
    "packed": (4, 8, 16, 32, 64, 128),
}


def block_sparse_modules(model: nn.Module) -> Iterator[tuple[str, BlockSparseLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear):
            yield name, module


def settle_sparsity(model: nn.Module) -> None:
    """Changes `model.config`: its record now says which modules are block-sparse."""
    part = {}
    for name, module in block_sparse_modules(model):
        entry = {"format": "bsr", "block_size": list(module.block_size), "num_blocks": len(module.values)}
        part[stored_name(model, name)] = entry
    for name, layer in packed_blocks(model).items():
        entry = {"format": "packed", "block_size": [layer.block_size] * 2, "num_blocks": layer.num_blocks}
        part[stored_name(model, name)] = entry
    write_part(model.config, "sparsity", part)


def validate(part: dict[str, Any]) -> None:
    """Raises ValueError, naming the module, for an entry that is not as described above."""
    for name, entry in part.items():
        if not isinstance(entry, dict) or set(entry) != ENTRIES or entry["format"] not in ("bsr", "packed"):
            raise ValueError(
                f"sparsity: {name!r} must have the entries {sorted(ENTRIES)} in format 'bsr' or 'packed', "
                f"got {entry!r}."
            )
        known = BLOCK_SIDES[entry["format"]]
        sides, count = entry["block_size"], entry["num_blocks"]
        if not (
            isinstance(sides, list)
            and len(sides) == 2
            and all(type(side) is int and side in known for side in sides)
            and (entry["format"] == "bsr" or sides[0] == sides[1])
        ):
            raise ValueError(f"sparsity: blocks of {name!r} must have two sides among {known}, got {sides!r}.")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"sparsity: num_blocks of {name!r} must be a number of blocks, got {count!r}.")


def prepare(model: nn.Module, part: dict[str, Any]) -> None:
    """Changes `model`, which is on the meta device: linear maps named in the record become empty block-sparse ones.

    A module that belongs to another task's head is passed over. Raises ValueError for one that is not there.
    """
    own = {name for name, _ in model.named_children()} | {name for name, _ in model.base_model.named_children()}
    names = {name for name, _ in model.named_modules()}
    for stored, entry in part.items():
        name = find_name(model, stored, names)
        if name is None:
            if stored.partition(".")[0] in own:
                raise ValueError(
                    f"sparsity: {type(model).__name__} has no module {stored!r}; the record is of another."
                )
            continue
        module = model.get_submodule(name)
        is_fit = type(module) is PackedLinear if entry["format"] == "packed" else is_plain(module)
        if not is_fit:
            raise ValueError(f"sparsity: {stored!r} is a {type(module).__name__}, which cannot be stored in blocks so.")
        N, K = out_features(module), in_features(module)
        (Bn, Bk), num_blocks = entry["block_size"], entry["num_blocks"]
        if num_blocks > -(-N // Bn) * -(-K // Bk):
            raise ValueError(f"sparsity: {stored!r} of shape {[N, K]} has no {num_blocks} blocks of {[Bn, Bk]}.")
        if entry["format"] == "packed":
            layer = PackedBlocksLinear.loading(module, Bn, num_blocks)
            layer._is_hf_initialized = True
            model.set_submodule(name, layer)
            continue
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        layer = BlockSparseLinear(K, N, (Bn, Bk), num_blocks, bias=module.bias is not None, **like)
        layer.is_loading = layer._is_hf_initialized = True
        model.set_submodule(name, layer)


def finish(model: nn.Module, part: dict[str, Any]) -> None:
    """Changes `model`: checks the loaded indices and builds what the kernels need. Raises ValueError."""
    for name, module in block_sparse_modules(model):
        module.is_loading = False
        try:
            module.build_index()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def sentinels(model: nn.Module, part: dict[str, Any]) -> list[str]:
    """Block-sparse modules have no tensor called `weight`, which Transformers alone would look for."""
    return [f"{name}.weight" for name, _ in block_sparse_modules(model)]
