"""The `bits` part of the record: which modules are packed, and how.

{"encoder.layer.0.attention.self.query": {"bits": 3, "group_size": 64}, ...}, each entry a `WeightScheme`
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.checkpoint.loader import HfCompressConfig, HfCompressQuantizer
from hf_compress.checkpoint.packed_ties import restore_ties, tied_modules, untie_packed
from hf_compress.checkpoint.stale import forget_stale_structure
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.product_embedding import ProductEmbedding
from hf_compress.layers.scheme import WeightScheme
from hf_compress.model.anatomy import is_plain
from hf_compress.model.record import QUANT_METHOD, find_name, stored_name, write_part
from hf_compress.surgery.stand_ins import ConfigOfSomeHeads

PART = "bits"


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedEmbedding | CodebookLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding, CodebookLinear)):
            yield name, module


def validate(bits: dict) -> None:
    """Raise ValueError, naming the module, for an entry that is no scheme."""
    for stored, entry in bits.items():
        WeightScheme.from_dict(entry, stored)


def prepare(model: PreTrainedModel, bits: dict) -> None:
    """Replace the modules named in `bits` by empty packed ones, before weights are loaded.

    A module that belongs to another task's head is passed over. Raises ValueError for a record that does not fit.
    """
    children = {name for name, _ in model.named_children()} | {name for name, _ in model.base_model.named_children()}
    names = {name for name, _ in model.named_modules()}
    for stored, entry in bits.items():
        name = find_name(model, stored, names)
        if name is None:
            if stored.partition(".")[0] in children:
                raise ValueError(f"The record packs {stored}, which {type(model).__name__} lacks: it is damaged.")
            continue
        scheme, module = WeightScheme.from_dict(entry, stored), model.get_submodule(name)
        if isinstance(module, nn.Embedding) and (scheme.num_levels is None or scheme.parts is not None):
            packed = _empty_table(module, scheme, stored)
        elif is_plain(module) and scheme.parts is None:
            packed = (PackedLinear if scheme.num_levels is None else CodebookLinear).like(module, scheme)
        else:
            raise ValueError(f"The record packs {stored}, a {type(module).__name__}: it is damaged.")
        # Initialising reads `weight` of every module and would dequantize the whole model. A subclass of nn.Embedding
        # may have buffers that only its initialisation fills, so those go through it.
        is_table = isinstance(packed, PackedEmbedding)
        packed.is_loading = True
        packed._is_hf_initialized = not is_table or type(packed) in (PackedEmbedding, ProductEmbedding)
        model.set_submodule(name, packed)
    untie_packed(model)


def _empty_table(module: nn.Embedding, scheme: WeightScheme, stored: str) -> PackedEmbedding:
    try:
        return (PackedEmbedding if scheme.parts is None else ProductEmbedding).like(module, scheme)
    except ValueError as error:
        raise ValueError(f"The record of {stored} is damaged: {error}") from error


def finish(model: PreTrainedModel, bits: dict) -> None:
    """Raise ValueError, naming the module, for loaded tensors that no quantizer wrote; then lay out the others."""
    for name, module in packed_modules(model):
        module.check(name)
        module.is_loading = False
        module.prepare(decodes=model.can_generate())


def sentinels(model: PreTrainedModel, bits: dict) -> list[str]:
    """The weight of the first packed linear layer: Transformers alone would look for it."""
    return [f"{name}.weight" for name, module in packed_modules(model) if not isinstance(module, PackedEmbedding)][:1]


def settle_bits(model: PreTrainedModel) -> None:
    """Changes `model`: its config's record says how its modules are packed, and Transformers knows it as quantized.

    The config becomes the model's own first, so that another model made from the same object stays unquantized.
    """
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is shared:
            module.config = own
        elif isinstance(config, ConfigOfSomeHeads) and config.shared is shared:
            module.config = ConfigOfSomeHeads(own, config.num_attention_heads)
    for _, module in packed_modules(model):
        if module.decodes != model.can_generate():
            module.prepare(decodes=model.can_generate())
    bits = {stored_name(model, name): module.scheme.to_dict() for name, module in packed_modules(model)}
    forget_stale_structure(model)
    write_part(own, PART, bits)
    model.hf_quantizer = HfCompressQuantizer(HfCompressConfig(**own.quantization_config))
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    own._is_quantized = True


@torch.no_grad()
def unpack(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Changes `model`: packed modules become ordinary ones with the dequantized weights, ties are restored."""
    tied = tied_modules(model)
    tables = {module: name for name, module in packed_modules(model)}
    for module, name in tables.items():
        model.set_submodule(name, module.unpacked(dtype))
    restore_ties(model, {name: (module, tables[module.table]) for name, module in tied.items()})
