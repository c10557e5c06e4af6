"""Which slot of the key-value cache each attention writes: its `layer_idx`."""

from collections.abc import Mapping, Sequence

from hf_compress.model.anatomy import Layer
from hf_compress.surgery.transaction import Transaction

SLOT_NAMES = ("layer_idx", "layer_id")  # the second in GPT-Neo


def assign_slots(
    transaction: Transaction, layers: Sequence[Layer], layer_types: Sequence[str] | None, num_heads: Mapping[str, int]
) -> None:
    """Number the cache slots of one stack of layers. `num_heads` names the attentions whose number of heads changes.

    A slot without heads always reports a length of zero, and a model asks the first slot (of each type of layer) how
    long the sequence is. So within a type the layers that have heads get the first slots.
    Raises ValueError if the stack has no head left, or none that could tell the length of the sequence.
    """
    types = list(layer_types) if layer_types and len(layer_types) == len(layers) else [None] * len(layers)
    for place in range(max(len(layer.attentions) for layer in layers)):  # self-attention, then cross-attention
        attentions = [layer.attentions[place] for layer in layers]
        left = [num_heads.get(attention.name, attention.num_heads) for attention in attentions]
        if not any(left):
            raise ValueError(
                f"This would remove every head from {attentions[0].name} to {attentions[-1].name}; keep at least one."
            )
        name = next((name for name in SLOT_NAMES if hasattr(attentions[0].module, name)), None)
        if name is None:
            continue
        is_causal = getattr(attentions[0].module, "is_causal", False)
        if is_causal and not any(n for n, layer_type in zip(left, types, strict=True) if layer_type == types[0]):
            raise ValueError(
                f"This would remove every head of the {types[0]!r} layers, whose cache tells the model how many tokens "
                "it has seen; keep at least one head in one of them."
            )
        for layer_type in dict.fromkeys(types):
            slots = [i for i in range(len(layers)) if types[i] == layer_type]
            users = sorted(slots, key=lambda i, left=left: left[i] == 0)  # stable: the others keep their order
            for slot, user in zip(slots, users, strict=True):
                transaction.set(attentions[user].module, name, slot)
