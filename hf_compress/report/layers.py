"""What each layer of a model is made of, and a picture of it: heads, neurons, bits, blocks, zeros."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.model.anatomy import Layer, anatomy, is_projection

ROW, TOP, LEFT, PANEL, BAR = 22, 34, 56, 168, 104  # pixels
COLOURS = {"heads": "#0072B2", "neurons": "#009E73", "bits": "#D55E00", "stored blocks": "#CC79A7", "zeros": "#888888",
           "sensitivity": "#E69F00"}  # fmt: skip


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


def layers_svg(
    layers: Sequence[LayerFacts],
    *,
    title: str,
    full_heads: int | None = None,
    full_neurons: int | None = None,
    sensitivity: Sequence[float] | None = None,
) -> str:
    """A picture of bars, one row a layer, as SVG text.

    full_heads, full_neurons  what a layer had before; the widest layer's, when not given
    sensitivity               one value for each layer, drawn beside the others

    Raises ValueError for no layers, or another number of sensitivities.
    """
    if not layers:
        raise ValueError(f"There is nothing to draw of {title}: its layers are not known.")
    panels = {
        "heads": ([layer.heads for layer in layers], full_heads or max(layer.heads for layer in layers), "{:.0f}"),
        "neurons": ([layer.neurons for layer in layers], full_neurons or max(v.neurons for v in layers), "{:.0f}"),
        "bits": ([layer.bits for layer in layers], max(8.0, *(layer.bits for layer in layers)), "{:.2g}"),
    }
    if any(layer.stored_blocks < 1 for layer in layers):
        panels["stored blocks"] = ([layer.stored_blocks for layer in layers], 1.0, "{:.0%}")
    if any(layer.zeros > 0.005 for layer in layers):
        panels["zeros"] = ([layer.zeros for layer in layers], 1.0, "{:.0%}")
    if sensitivity is not None:
        if len(sensitivity) != len(layers):
            raise ValueError(f"sensitivity must have {len(layers)} values, one a layer, got {len(sensitivity)}.")
        panels["sensitivity"] = (list(sensitivity), max(*sensitivity, 1e-30), "{:.2g}")
    width, height = LEFT + PANEL * len(panels), TOP + ROW * len(layers) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}" font-family="sans-serif" font-size="12">',
        f"<title>{html.escape(title)}</title>",
    ]
    for number in range(len(layers)):
        parts.append(f'<text x="4" y="{TOP + ROW * number + 15}" fill="#666">layer {number}</text>')
    for place, (name, (values, full, form)) in enumerate(panels.items()):
        x = LEFT + PANEL * place + 6
        most = "" if name in ("bits", "sensitivity") else f" of {form.format(full)}"
        parts.append(f'<text x="{x}" y="20" fill="#222" font-weight="bold">{name}{most}</text>')
        for number, value in enumerate(values):
            y = TOP + ROW * number
            filled = BAR * min(max(value / full, 0.0), 1.0) if full else 0.0
            parts.append(f'<rect x="{x}" y="{y + 3}" width="{BAR}" height="14" fill="#EEE"/>')
            parts.append(f'<rect x="{x}" y="{y + 3}" width="{filled:.1f}" height="14" fill="{COLOURS[name]}"/>')
            parts.append(f'<text x="{x + BAR + 5}" y="{y + 15}" fill="#222">{form.format(value)}</text>')
    return "\n".join([*parts, "</svg>"])


def by_layer(model: PreTrainedModel, sensitivity: Mapping[str, float]) -> list[float]:
    """The mean of {module: value}, as `hessian_sensitivity` gives it, over the modules of each layer."""
    means = []
    for layer in anatomy(model).layers:
        own = [value for name, value in sensitivity.items() if name.startswith(f"{layer.name}.")]
        means.append(sum(own) / len(own) if own else 0.0)
    return means
