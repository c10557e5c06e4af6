"""What each layer of a model is made of, and a picture of it: heads, neurons, bits, blocks, zeros."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn
from transformers import PreTrainedModel

from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.model.anatomy import Layer, anatomy, is_projection

ROW, TOP, LEFT, PANEL, BAR = 22, 34, 78, 168, 104  # pixels
COLOURS = {"heads": "#0072B2", "neurons": "#009E73", "bits": "#D55E00", "stored blocks": "#CC79A7", "zeros": "#888888",
           "sensitivity": "#E69F00", "tokens": "#56B4E9"}  # fmt: skip


@dataclass(frozen=True)
class LayerFacts:
    """One layer. Its weights are those of its linear maps."""

    heads: int  # of all its attentions
    neurons: int
    bits: float  # mean bits of a stored weight, scales not counted
    stored_blocks: float  # share of the weights that is stored, where layers are block-sparse
    zeros: float  # share of zeros among the stored weights


def layer_facts(model: PreTrainedModel) -> tuple[LayerFacts, ...]:
    """Of each layer, without running it; empty for a model that the anatomy does not know."""
    try:
        layers = anatomy(model).layers
    except ValueError:
        return ()
    return tuple(_facts(layer) for layer in layers)


def embedding_facts(model: PreTrainedModel) -> dict[str, float]:
    """How many tokens the table of embeddings has, and the bits of each stored value; nothing for a model of pixels."""
    table = model.get_input_embeddings()
    number = getattr(table, "num_embeddings", None)
    if number is None:
        return {}
    scheme, own = getattr(table, "scheme", None), table._parameters.get("weight")
    if scheme is not None:
        bits = scheme.index_bits(table.embedding_dim)
    else:
        bits = 32 if own is None else 8 * own.element_size()
    return {"tokens": number, "embedding_bits": bits}


def _facts(layer: Layer) -> LayerFacts:
    weights = stored = bits = zeros = 0.0
    for module in layer.module.modules():
        if not (is_projection(module) and _size(module)):
            continue
        scheme = getattr(module, "scheme", None)
        size, share = _size(module), module.density if isinstance(module, BlockSparseLinear) else 1.0
        weights, stored = weights + size, stored + size * share
        own = module._parameters.get("values" if isinstance(module, BlockSparseLinear) else "weight")
        bits += size * share * (scheme.bits if scheme is not None else 32.0 if own is None else 8 * own.element_size())
        if own is not None and not own.is_meta:
            zeros += float((own.detach() == 0).sum()) * (size * share / max(own.numel(), 1))
    return LayerFacts(
        heads=sum(attention.num_heads for attention in layer.attentions),
        neurons=layer.feed_forward.num_neurons,
        bits=bits / max(stored, 1.0),
        stored_blocks=stored / max(weights, 1.0),
        zeros=zeros / max(stored, 1.0),
    )


def _size(module: nn.Module) -> int:
    return getattr(module, "in_features", 0) * getattr(module, "out_features", 0) or module.weight.numel()


@dataclass(frozen=True)
class Full:
    """What a model had before: bars are shares of it, and what went stands in outline."""

    layers: int
    heads: int
    neurons: int
    bits: float
    tokens: int | None = None

    @classmethod
    def of(cls, models: Sequence[Sequence[LayerFacts]], tokens: Sequence[int] = ()) -> "Full":
        """The most that any of the models has."""
        every = [layer for layers in models for layer in layers]
        widest = {name: max(getattr(layer, name) for layer in every) for name in ("heads", "neurons", "bits")}
        return cls(layers=max(map(len, models)), tokens=max(tokens, default=None), **widest)


def layers_svg(
    layers: Sequence[LayerFacts],
    *,
    title: str,
    full: Full | None = None,
    tokens: int | None = None,
    embedding_bits: float | None = None,
    sensitivity: Sequence[float] | None = None,
) -> str:
    """A picture of bars, one row a layer or for several that are alike, as SVG text.

    full          what the model was before, drawn in outline; the most that a layer has now, when not given
    tokens        of the vocabulary, with `embedding_bits` a row of its own
    sensitivity   one value for each layer, drawn beside the others

    Raises ValueError for no layers, or another number of sensitivities.
    """
    if not layers:
        raise ValueError(f"There is nothing to draw of {title}: its layers are not known.")
    if sensitivity is not None and len(sensitivity) != len(layers):
        raise ValueError(f"sensitivity must have {len(layers)} values, one a layer, got {len(sensitivity)}.")
    full = full or Full.of([layers])
    panels = {"heads": (full.heads, "{:.0f}"), "neurons": (full.neurons, "{:.0f}"), "bits": (full.bits, "{:.2g}")}
    columns = [{"heads": one.heads, "neurons": one.neurons, "bits": one.bits} for one in layers]
    if any(layer.stored_blocks < 1 for layer in layers):
        panels["stored blocks"] = (1.0, "{:.0%}")
    if any(layer.zeros > 0.005 for layer in layers):
        panels["zeros"] = (1.0, "{:.0%}")
    if sensitivity is not None:
        panels["sensitivity"] = (max(*sensitivity, 1e-30), "{:.2g}")
    for number, (column, layer) in enumerate(zip(columns, layers, strict=True)):
        column |= {"stored blocks": layer.stored_blocks, "zeros": layer.zeros}
        column |= {} if sensitivity is None else {"sensitivity": sensitivity[number]}
    rows = _alike([{name: column[name] for name in panels} for column in columns])
    if tokens is not None:
        rows.insert(0, ("tokens", {"tokens": tokens, "bits": embedding_bits}))
    if gone := full.layers - len(layers):
        rows.append((f"{gone} gone", {}))
    width, height = LEFT + PANEL * len(panels), TOP + ROW * len(rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}" font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>{html.escape(title)}</title>",
    ]
    for place, (name, (most, form)) in enumerate(panels.items()):
        of = "" if name == "sensitivity" else f" of {form.format(most)}"
        parts.append(f'<text x="{LEFT + PANEL * place + 6}" y="20" font-weight="bold">{name}{of}</text>')
    for number, (label, values) in enumerate(rows):
        y = TOP + ROW * number
        parts.append(f'<text x="4" y="{y + 15}">{label}</text>')
        for place, (name, (most, form)) in enumerate(panels.items()):
            x, own = LEFT + PANEL * place + 6, name
            if name == "heads" and "tokens" in values:  # the vocabulary's bar stands in the first column
                own, most, form = "tokens", full.tokens or tokens, "{:,.0f}"
            if own in values or not values:
                parts += _bar(x, y, values.get(own), most, form, COLOURS[own])
    return "\n".join([*parts, "</svg>"])


def _alike(columns: list[dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    """Rows with their labels; neighbours that are alike share one."""
    rows = []
    for _, group in groupby(enumerate(columns), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.append((f"layer {span}" if len(numbers) == 1 else f"layers {span}", columns[numbers[0]]))
    return rows


def _bar(x: int, y: int, value: float | None, most: float, form: str, colour: str) -> list[str]:
    """A bar within the outline of what there was; the outline alone for None."""
    filled = BAR * min(max((value or 0.0) / most, 0.0), 1.0) if most else 0.0
    outline = f'<rect x="{x}" y="{y + 3}" width="{BAR}" height="14" fill="none" stroke="#888" stroke-dasharray="2 2"/>'
    if value is None:
        return [outline]
    return [
        outline,
        f'<rect x="{x}" y="{y + 3}" width="{filled:.1f}" height="14" fill="{colour}"/>',
        f'<text x="{x + BAR + 5}" y="{y + 15}">{form.format(value)}</text>',
    ]


def by_layer(model: PreTrainedModel, sensitivity: Mapping[str, float]) -> list[float]:
    """The mean of {module: value}, as `hessian_sensitivity` gives it, over the modules of each layer."""
    means = []
    for layer in anatomy(model).layers:
        own = [value for name, value in sensitivity.items() if name.startswith(f"{layer.name}.")]
        means.append(sum(own) / len(own) if own else 0.0)
    return means
