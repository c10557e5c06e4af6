"""What surgery can cut of a model, also where its layers are no modules that could be taken one by one.

ALBERT runs one layer several times: what goes from it goes from all. XLM and FlauBERT keep attentions, feed-forwards
and norms in lists of their own. Heads and neurons of these are described as elsewhere; whoever needs layers as modules
(hints, GPTQ layer by layer, students) asks `anatomy`, which refuses them.
"""

from dataclasses import replace

from torch import nn

from hf_compress.model.anatomy import Anatomy, Layer, Stack, anatomy, describe_layer, in_features, is_readable

LISTS = ("attentions", "layer_norm1", "ffns", "layer_norm2")  # of XLM and FlauBERT, side by side


def cuttable(model: nn.Module) -> Anatomy:
    """`anatomy`, or for the models above what can be cut of them. Raises ValueError for what neither describes."""
    if is_readable(model):
        return anatomy(model)
    if (shared := shared_layers(model)) is not None:
        name, groups = shared
        layers = [
            describe_layer(model, f"{name}.{g}.albert_layers.{i}", layer)
            for g, group in enumerate(groups)
            for i, layer in enumerate(group.albert_layers)
        ]
        stack = Stack(name, groups, tuple(layers))
    elif (lists := layer_lists(model)) is not None:
        name, backbone = lists
        stack = Stack(f"{name}attentions", backbone.attentions, tuple(_listed(model, name, backbone)))
    else:
        return anatomy(model)  # says why not
    width = in_features(stack.layers[0].attention.query)
    return Anatomy((stack,), width, model.get_input_embeddings(), model.get_output_embeddings())


def shared_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The groups of layers that run again and again, with their name; None in other models."""
    found = ((n, m) for n, m in model.named_modules() if n.rpartition(".")[2] == "albert_layer_groups")
    return next(found, None)


def layer_lists(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The module that has the parts of its layers in `LISTS`, with the prefix of its parts; None in other models."""
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, part, None), nn.ModuleList) for part in LISTS):
            return (f"{name}." if name else ""), module
    return None


def _listed(model: nn.Module, prefix: str, backbone: nn.Module) -> list[Layer]:
    layers = []
    for i, (attention, feed_forward) in enumerate(zip(backbone.attentions, backbone.ffns, strict=True)):
        name = f"{prefix}attentions.{i}"
        layer = describe_layer(model, name, nn.ModuleList([attention, feed_forward]))
        layers.append(replace(layer, attentions=tuple(replace(a, name=name) for a in layer.attentions)))
    return layers
