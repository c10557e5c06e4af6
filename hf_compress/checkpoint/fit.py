"""Whether the parts of a model fit each other, and say of themselves what their weights say."""

from torch import nn

from hf_compress.model.anatomy import FeedForward, in_features, out_features
from hf_compress.model.attention import Attention
from hf_compress.model.cuttable import cuttable
from hf_compress.surgery.heads import head_attributes
from hf_compress.surgery.position_bias import kept_heads


def check_fit(model: nn.Module) -> None:
    """Raises ValueError for projections whose widths do not meet, and for attributes that contradict them."""
    parts = cuttable(model)
    for stack in parts.stacks:
        for layer in stack.layers:
            for attention in layer.attentions:
                _check_attention(attention, num_layers=len(stack.layers))
            _check_feed_forward(layer.name, layer.feed_forward)
            widths = {out_features(layer.feed_forward.output)}
            for attention in layer.attentions:
                widths |= {in_features(attention.query), out_features(attention.output)}
            if widths != {parts.hidden_size} and not layer.has_own_attention:
                raise ValueError(
                    f"structure: {layer.name} works on widths {sorted(widths)}, the model on {parts.hidden_size}."
                )


def _check_attention(attention: Attention, *, num_layers: int) -> None:
    head_dim, heads, groups = attention.head_dim, attention.num_heads, attention.num_key_value_heads
    rows = [out_features(m) for m in (attention.query, attention.key, attention.value, *attention.positional)]
    queries, pairs = heads * head_dim, groups * head_dim
    expected = [queries + 2 * pairs] * 3 if attention.is_fused else [queries, pairs, pairs]
    expected += [queries] * len(attention.positional)
    is_grouped = any(hasattr(attention.module, name) for name in ("num_key_value_groups", "num_kv_heads"))
    groups_fit = (heads % groups == 0 if groups else heads == 0) if is_grouped else heads == groups
    if rows != expected or in_features(attention.output) != queries or not groups_fit:
        raise ValueError(
            f"structure: the projections of {attention.name} do not fit each other: query, key, value (and positions) "
            f"have {rows} rows, the output {in_features(attention.output)} columns, one head {head_dim}."
        )
    if len(kept_heads(attention)) != heads:
        raise ValueError(f"structure: {attention.name} has {heads} heads, and the bias of {kept_heads(attention)}.")
    wanted = {**head_attributes(heads, groups, head_dim), "layer_idx": range(num_layers)}
    for name, value in wanted.items():
        actual = getattr(attention.module, name, value)
        if isinstance(value, range) and actual is not value:
            if actual not in value and actual is not None:
                raise ValueError(
                    f"structure: {name}={actual} of {attention.name} is not one of its {len(value)} layers."
                )
        elif actual != value:
            raise ValueError(
                f"structure: {name}={actual} of {attention.name} contradicts its weights, which say {value}."
            )


def _check_feed_forward(name: str, part: FeedForward) -> None:
    neurons = in_features(part.output)
    rows = [out_features(m) for m in part.inputs]
    if any(n != (2 * neurons if part.is_fused else neurons) for n in rows):
        raise ValueError(
            f"structure: the feed-forward of {name} does not fit: {rows} rows lead in, {neurons} columns out."
        )
