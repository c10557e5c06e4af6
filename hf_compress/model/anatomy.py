"""Finds the parts of a text model by their structure: layers, attention, feed-forward, embeddings and head.

Only q, k and v are recognised by name; shapes and order say the rest, so no code has to ask for a `model_type`.
Weights are `nn.Linear` (out, in) or GPT-2's `Conv1D` (in, out); `out_features` and `in_features` read both.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hf_compress.model.attention import ROW_ORDERS, Attention, Projection
from hf_compress.model.classes import plain_class

PROJECTION_NAMES = {
    "query": re.compile(r"q|query|q_proj|q_lin|query_proj"),
    "key": re.compile(r"k|key|k_proj|k_lin|key_proj"),
    "value": re.compile(r"v|value|v_proj|v_lin|value_proj"),
    "fused": re.compile(r"c_attn|qkv|Wqkv|qkv_proj|query_key_value|in_proj"),
}
POSITIONAL = re.compile(  # DeBERTa, Longformer, LUKE: their rows go with the heads
    r"pos_((key|query|k|q)_)?proj|(query|key|value)_global|(w2e|e2w|e2e)_query"
)
HEAD_DIM_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_per_head", "head_size")

OTHER_LAYERS = ("MPNetLayer",)  # layers that are no `GradientCheckpointingLayer`
IN_LISTS = (
    "attentions, norms and feed-forwards lie in lists of their own. hfc.prune_heads, prune_neurons and prune_layers "
    "work, and it can be quantized"
)
WHY_NOT = {  # beginning of a class's name -> why structure does not explain it
    "Albert": "its layers are one set of weights, run again and again. hfc.prune_heads, prune_neurons and prune_layers "
    "work, and it can be quantized",
    "Flaubert": IN_LISTS,
    "SqueezeBert": "its projections are grouped convolutions, which nothing here cuts or packs",
    "XLM": IN_LISTS,
}

NO_ATTENTION = "has no attention (its tokens are mixed without weights)"
OWN_ATTENTION = {  # layers of which the (last) feed-forward is described alone -> why their heads are not
    "ConvBertLayer": "has heads that are half convolutions, whose widths follow from the config",
    "MobileBertLayer": "has its heads inside a bottleneck, on several inputs of different widths",
}


def is_projection(module: nn.Module) -> bool:
    """True for a linear map: `nn.Linear` and its subclasses, or GPT-2's `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_plain(module: nn.Module) -> bool:
    """True for a linear map that is its weight and bias and nothing else; what another subclass adds is not known."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"  # the same, written out


def out_features(module: Projection) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features


def in_features(module: Projection) -> int:
    return module.nx if isinstance(module, Conv1D) else module.in_features


def matrix(module: Projection | nn.Embedding) -> Tensor:
    """The weight as (N, K): out_features, in_features; a table as (V, D)."""
    weight = module._parameters.get("weight")  # itself: as an attribute, that of a fake-quantized table is on its grid
    weight = module.weight if weight is None else weight
    return weight.t() if isinstance(module, Conv1D) else weight


@dataclass(frozen=True)
class FeedForward:
    """inputs: one projection (F, D), or gate and up; output: (D, F)."""

    inputs: tuple[Projection, ...]
    output: Projection
    is_fused: bool  # gate and up in one projection (2 * F, D)

    @property
    def num_neurons(self) -> int:
        return in_features(self.output)


@dataclass(frozen=True)
class Layer:
    name: str
    module: nn.Module
    attentions: tuple[Attention, ...]  # self-attention, then cross-attention if there is one; none in FNet
    feed_forward: FeedForward

    @property
    def attention(self) -> Attention:
        if not self.attentions:
            raise no_heads(self)
        return self.attentions[0]

    @property
    def has_own_attention(self) -> bool:
        """Whether it attends in a way that is not described here; it may then work on another width than the model."""
        return type(self.module).__name__ in OWN_ATTENTION


@dataclass(frozen=True)
class Stack:
    """A list of layers that run one after the other: the encoder, the decoder."""

    name: str  # of the `nn.ModuleList`
    modules: nn.ModuleList
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Anatomy:
    stacks: tuple[Stack, ...]  # encoder before decoder
    hidden_size: int
    embeddings: nn.Module | None  # input embeddings; None for models of pixels
    head: nn.Module | None  # output embeddings of language models; None for classifiers

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, those of an encoder before those of a decoder."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Of all layers. Raises ValueError for a model without attention."""
        found = tuple(attention for layer in self.layers for attention in layer.attentions)
        if not found:
            raise no_heads(self.layers[0])
        return found


def no_heads(layer: Layer) -> ValueError:
    why = OWN_ATTENTION.get(type(layer.module).__name__, NO_ATTENTION)
    return ValueError(f"{layer.name} {why}: there are no heads to measure, cut or imitate.")


def anatomy(model: nn.Module) -> Anatomy:
    """Describe `model` by its structure. Raises ValueError, naming the model and what was not found."""
    stacks = tuple(
        Stack(name, modules, tuple(describe_layer(model, f"{name}.{i}", block) for i, block in enumerate(modules)))
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList) and len(modules) and all(map(_is_layer, modules))
    )
    if not stacks:
        raise _not_found(model, "a list of transformer layers")
    for stack in stacks:
        if any(layer.attentions for layer in stack.layers):
            for layer in (layer for layer in stack.layers if not layer.attentions):
                raise _not_found(model, f"query, key and value projections in {layer.name}")
    first = stacks[0].layers[0]
    width = model.config.hidden_size if first.has_own_attention else out_features(first.feed_forward.output)
    table = input_embeddings(model)
    return Anatomy(stacks, width, table if isinstance(table, nn.Embedding) else None, _head(model))


def is_readable(model: nn.Module) -> bool:
    """Whether `anatomy` can describe `model`."""
    try:
        anatomy(model)
    except ValueError:
        return False
    return True


def layer_maps(model: nn.Module) -> dict[str, Projection]:
    """Name -> each linear map inside the layers, also of models that `anatomy` cannot describe: what lies in lists."""
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return {name: m for name, m in model.named_modules() if is_projection(m) and name.startswith(lists)}


def _is_layer(block: nn.Module) -> bool:
    return isinstance(block, GradientCheckpointingLayer) or type(block).__name__ in OTHER_LAYERS


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """The (first) name of each module of `model`."""
    return {module: name for name, module in reversed(list(model.named_modules()))}


def _projections(block: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a layer by name. A layer of a PEFT adapter is the map that it wraps, not its own parts."""
    found, adapters = {}, ()
    for name, module in block.named_modules():
        if is_projection(getattr(module, "base_layer", None)):
            adapters += (f"{name}.",)
            found[name] = module
        elif is_projection(module) and not name.startswith(adapters):
            found[name] = module
    return found


def describe_layer(model: nn.Module, name: str, block: nn.Module) -> Layer:
    projections = _projections(block)
    if type(block).__name__ in OWN_ATTENTION:
        inputs, output = projections.get("intermediate.dense"), projections.get("output.dense")
        if inputs is None or output is None:  # ConvBERT with num_groups > 1
            raise _not_found(model, f"linear maps intermediate.dense and output.dense in {name}")
        return Layer(name, block, (), FeedForward((inputs,), output, is_fused=False))
    attentions = tuple(_attentions(model, name, block, projections))
    if not attentions and len(projections) != 2:  # a feed-forward alone
        raise _not_found(model, f"query, key and value projections in {name}")
    used = {m for a in attentions for m in (a.query, a.key, a.value, a.output, *a.positional)}
    rest = [m for m in projections.values() if m not in used]
    hidden_size = in_features(attentions[0].query if attentions else rest[0])
    # The last one leads back to the hidden size, the others away from it: this also holds for square matrices.
    widths = {out_features(m) for m in rest[:-1]}
    if (
        len(rest) < 2 or out_features(rest[-1]) != hidden_size or len(widths) > 1
        or any(in_features(m) != hidden_size for m in rest[:-1])
    ):  # fmt: skip
        shapes = {n: (out_features(m), in_features(m)) for n, m in projections.items() if m in rest}
        raise _not_found(
            model, f"a feed-forward (D -> F -> D, D={hidden_size}) in {name}, whose other weights are {shapes}"
        )
    inputs, output = tuple(rest[:-1]), rest[-1]
    is_fused = len(inputs) == 1 and in_features(output) > 0 and out_features(inputs[0]) == 2 * in_features(output)
    return Layer(name, block, attentions, FeedForward(inputs, output, is_fused))


def _attentions(
    model: nn.Module, name: str, block: nn.Module, projections: dict[str, Projection]
) -> Iterator[Attention]:
    names = list(projections)
    parents = {n.rpartition(".")[0] for n in names}
    found = []
    for parent in sorted(parents, key=lambda p: min(i for i, n in enumerate(names) if n.rpartition(".")[0] == p)):
        leaves = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == parent}
        roles = {
            role: leaves[leaf] for leaf in leaves for role, known in PROJECTION_NAMES.items() if known.fullmatch(leaf)
        }
        kind = plain_class(block.get_submodule(parent)).__name__
        if "fused" in roles and (leaves.get("in_proj") != roles["fused"] or kind in ROW_ORDERS):  # Mamba has one, too
            roles = dict.fromkeys(("query", "key", "value"), roles["fused"])
        if {"query", "key", "value"} <= roles.keys():
            positional = [leaves[leaf] for leaf in leaves if POSITIONAL.fullmatch(leaf)]
            found.append((parent, roles, positional))
    taken = {n for _, roles, positional in found for n in (*roles.values(), *positional)}
    for i, (parent, roles, positional) in enumerate(found):
        full_name = f"{name}.{parent}" if parent else name
        module = block.get_submodule(parent)
        head_dim = next((getattr(module, n) for n in HEAD_DIM_NAMES if hasattr(module, n)), None)
        if not head_dim:
            raise _not_found(model, f"the size of a head ({', '.join(HEAD_DIM_NAMES)}) on {full_name}")
        query, key, value = (projections[roles[r]] for r in ("query", "key", "value"))
        last = max(names.index(n) for n in roles.values())
        beside = [n for n in names if n.rpartition(".")[0] == parent]  # Phi-3 has its output first
        following = [projections[n] for n in (*beside, *names[last + 1 :]) if n not in taken]
        output = next((m for m in following if _leads_back(m, query)), None)
        if output is None:
            raise _not_found(model, f"the output projection of {full_name}")
        num_heads = in_features(output) // head_dim
        is_fused = query is key
        num_kv = (out_features(key) // head_dim - num_heads) // 2 if is_fused else out_features(key) // head_dim
        leaf = roles["query"].rpartition(".")[2]
        order = ROW_ORDERS.get(plain_class(module).__name__, ROW_ORDERS.get(leaf)) if is_fused else None
        yield Attention(full_name, module, query, key, value, output, head_dim, num_heads, num_kv,
                        tuple(projections[n] for n in positional), is_cross=i > 0, row_order=order)  # fmt: skip


def _leads_back(output: Projection, query: Projection) -> bool:
    """Whether `output` maps the heads of `query` back to its input's width."""
    is_fused = out_features(query) != in_features(output)
    return out_features(output) == in_features(query) and (not is_fused or in_features(output) < out_features(query))


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """What the model looks its tokens up in; None where it has no one table of them, as CANINE."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _head(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _not_found(model: nn.Module, what: str) -> ValueError:
    name = type(model).__name__
    why = next((why for start, why in WHY_NOT.items() if name.startswith(start)), None)
    if why is not None:
        return ValueError(f"{name} cannot be read by structure: {why}.")
    return ValueError(
        f"{name} is not a model that can be read by structure: expected {what}, found none. "
        "Supported are models built of transformer layers with separate weights for each layer (docs/families.md)."
    )
