"""Which modules of a model can be quantized, and how a quantized weight takes its module's place."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.sparsity import block_sparse_modules, settle_sparsity
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.low_rank import LowRank
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear, unpacked_linear
from hf_compress.layers.scheme import WeightScheme, auto_group_size, check_bits
from hf_compress.model.anatomy import anatomy, in_features, is_plain, layer_maps, matrix
from hf_compress.model.record import read_part
from hf_compress.model.weights import check_no_adapters
from hf_compress.quantization.grids import QuantizedWeight, fits_float16, group_rows
from hf_compress.surgery.settle import build_twin
from hf_compress.training.stored import in_blocks

AUTO = {"auto": 128, "auto-64": 64, "auto-32": 32}  # how groups are asked for that fit -> the largest of them


def is_linear(module: nn.Module) -> bool:
    """A linear map and no more: what a subclass adds would be lost. Empty ones (pruned) do not count."""
    return is_plain(module) and module.weight.numel() > 0


def choose_modules(
    model: PreTrainedModel,
    bits: int | Mapping[str, int],
    *,
    embedding_bits: int | None = None,
    skip_modules: Sequence[str] = (),
    one_bit: bool = False,
) -> dict[str, int]:
    """{module name: bits}: those named in `bits`, or all linear maps inside the layers of the model.

    `one_bit` allows 1 for linear maps, which codebooks of two levels take.
    """
    check_no_adapters(model)
    if isinstance(bits, Mapping):
        chosen = dict(bits)
        for name in chosen:
            check_quantizable(model, name)
    else:
        chosen = {name: bits for name, module in layer_maps(model).items() if is_linear(module)}
        if not chosen:
            anatomy(model)  # says why
            raise ValueError(f"{type(model).__name__} has no linear map in its layers: there is nothing to quantize.")
    if embedding_bits is not None:
        chosen |= dict.fromkeys(embedding_names(model), embedding_bits)
    try:
        patterns = [re.compile(pattern) for pattern in skip_modules]
    except re.error as error:
        raise ValueError(f"skip_modules: {error.pattern!r} is no regular expression: {error}.") from error
    for pattern in patterns:
        if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
            raise ValueError(f"skip_modules: no module of {type(model).__name__} is called {pattern.pattern!r}.")
    chosen = {name: b for name, b in chosen.items() if not any(p.fullmatch(name) for p in patterns)}
    for name, width in chosen.items():
        if one_bit and width == 1 and is_linear(model.get_submodule(name)):
            continue
        try:
            check_bits(width)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not chosen:
        raise ValueError(f"Nothing is left to quantize in {type(model).__name__}: all modules are skipped.")
    return chosen


def check_quantizable(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module called {name!r}.") from error
    if not is_linear(module) and not isinstance(module, nn.Embedding):
        raise ValueError(
            f"{name} is a {type(module).__name__}; only nn.Linear, Conv1D and embeddings can be quantized."
        )
    source = model.all_tied_weights_keys.get(f"{name}.weight")
    if source is not None:
        raise ValueError(
            f"{name} shares its weight with {source.removesuffix('.weight')}. Quantize that: this follows."
        )
    return module


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Word, position and token-type tables; where several are one weight, the one that holds it: the others follow."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    sources = {k.removesuffix(".weight"): s.removesuffix(".weight") for k, s in model.all_tied_weights_keys.items()}
    shared = [f"{name} ({sources[name]})" for name in tables if sources.get(name, name) not in tables]
    if factors := [name for name, module in tables.items() if isinstance(module, LowRank)]:
        raise ValueError(
            f"The embeddings {factors} are a product of two factors (`factorise_embeddings`), which cannot be packed: "
            "leave them out with embedding_bits=None, or pack them in place of factorising."
        )
    if shared:
        raise ValueError(f"The embeddings {shared} take their weight from what is no embedding; they cannot be packed.")
    return [name for name in tables if name not in sources]


def scheme_for(module: nn.Module, name: str, bits: int, *, group_size: int | str, symmetric: bool = False,
               scale_dtype: str = "auto", **options) -> WeightScheme:  # fmt: skip
    """How `module` is to be packed. Scales are float16, with "auto" float32 where that could not hold them.

    Raises ValueError, naming the module, for groups that do not divide it and for scales that float16 cannot hold.
    """
    if isinstance(module, nn.Embedding):
        scheme = WeightScheme(bits, -1, symmetric)
    else:
        scheme = WeightScheme(bits, _group_size(module, name, group_size), symmetric, **options)
    if scale_dtype not in ("auto", "float16"):
        return replace(scheme, scale_dtype=scale_dtype)
    with align_module_device(module):  # where its weight is on disk
        fits = fits_float16(group_rows(matrix(module).detach(), scheme.group_size), bits, symmetric=symmetric)
    if not fits and scale_dtype == "float16":
        raise ValueError(
            f"{name}: float16 cannot hold the scales of its weights, which are too small or too large. Choose "
            "scale_dtype='auto' or 'float32', or leave it out with `skip_modules`."
        )
    return scheme if fits else replace(scheme, scale_dtype="float32")


def _group_size(module: nn.Module, name: str, group_size: int | str) -> int:
    columns = in_features(module)
    size = auto_group_size(columns, AUTO[group_size]) if group_size in AUTO else group_size
    if isinstance(size, int) and size > 0 and columns % size:
        raise ValueError(
            f"{name}: group_size must divide in_features, got group_size={size}, in_features={columns}. "
            f"Choose another one, group_size='auto', or leave this layer out with `skip_modules`."
        )
    return size


@torch.no_grad()
def set_matrix(module: nn.Module, weight: Tensor) -> None:
    matrix(module).copy_(weight)


def install(model: nn.Module, name: str, weight: QuantizedWeight, scheme: WeightScheme) -> None:
    """Put a packed layer with the integers of `weight` in the place of module `name`."""
    model.set_submodule(name, packed(model.get_submodule(name), weight, scheme))


def packed(module: nn.Module, weight: QuantizedWeight, scheme: WeightScheme) -> PackedLinear | PackedEmbedding:
    """The packed layer with the integers of `weight` that takes the place of `module`."""
    if isinstance(module, nn.Embedding):
        scales, zeros = weight.scales.t().contiguous(), weight.zero_points.t().contiguous()  # (V, G)
        layer = PackedEmbedding.like(module, scheme).fill(weight.q, scales, zeros)
    else:
        g_idx = weight.g_idx if scheme.desc_act else None
        layer = PackedLinear.like(module, scheme).fill(weight.q, weight.scales, weight.zero_points, g_idx)
    return layer.train(module.training)


@contextmanager
def dense_blocks(model: PreTrainedModel) -> Iterator[Mapping[str, BlockSparseLinear]]:
    """While open, the block-sparse maps of `model` are ordinary ones; yields them by name.

    What is packed by then stays packed, saved in blocks of the same size; the others are what they were.
    """
    found = dict(block_sparse_modules(model))
    twin = build_twin(model, model.config, read_part(model.config, "structure")) if found else None
    for name, module in found.items():
        is_conv1d = isinstance(twin.get_submodule(name), Conv1D)
        model.set_submodule(name, unpacked_linear(module, module.dense_weight().detach(), is_conv1d=is_conv1d))
    try:
        yield found
    finally:
        for name, module in found.items():
            model.set_submodule(name, _again_in_blocks(model.get_submodule(name), module, name))
        if found:
            settle_sparsity(model)


def _again_in_blocks(module: nn.Module, before: BlockSparseLinear, name: str) -> nn.Module:
    return in_blocks(module, before.block_size[0], name) if isinstance(module, PackedLinear) else before
