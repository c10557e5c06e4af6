"""Layers that are no modules of their own: run again and again (ALBERT), or in lists side by side (XLM, FlauBERT)."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_compress.model.anatomy import anatomy
from hf_compress.model.cuttable import LISTS, layer_lists, shared_layers
from hf_compress.surgery.transaction import Transaction


def prune_other_layers(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Changes `model` and its config: it keeps the layers numbered in `keep`, in that order.

    Where they are one set of weights, as many of them run as `keep` names, whichever these are.
    Raises ValueError for models with other layers, and for layers that do not exist or are named twice.
    """
    keep, lists = list(keep), layer_lists(model)
    if lists is None and (shared_layers(model) is None or model.config.num_hidden_groups > 1):
        anatomy(model)  # says why not
    depth = model.config.num_hidden_layers
    if not keep or len(set(keep)) < len(keep) or any(not isinstance(i, int) or not 0 <= i < depth for i in keep):
        raise ValueError(f"keep must name layers from 0 to {depth - 1}, at least one and each once, got {keep}.")
    with Transaction(model) as transaction:
        transaction.set(model.config, "num_hidden_layers", len(keep))
        if lists is None:
            return
        prefix, backbone = lists
        transaction.set(backbone, "n_layers", len(keep))
        for name in LISTS:
            blocks = [getattr(backbone, name)[i] for i in keep]
            transaction.replace(f"{prefix}{name}", lambda old, blocks=blocks: type(old)(blocks))
        for slot, i in enumerate(keep):
            transaction.set(backbone.attentions[i], "layer_id", slot)
