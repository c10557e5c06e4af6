"""One attention of a model and its projections: which rows and columns of them belong to which head."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

BY_ROLE, BY_GROUP = "by role", "by group"
ROW_ORDERS = {  # of a fused projection, by its name or its attention's class; others are not known, and not cut
    "c_attn": BY_ROLE,
    "Wqkv": BY_ROLE,
    "Phi3Attention": BY_ROLE,
    "GPTNeoXAttention": BY_GROUP,
    "BloomAttention": BY_GROUP,
    "FalconAttention": BY_GROUP,
    "FalconFlashAttention2": BY_GROUP,
    "DisentangledSelfAttention": BY_GROUP,
}
HEAD_BIASES = ("q_bias", "v_bias")  # DeBERTa v1 has them apart

Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class Attention:
    """One attention and its projections: H heads of size `head_dim`, grouped over the key-value heads."""

    name: str  # of the module that owns the projections, within the model
    module: nn.Module
    query: Projection  # (H * head_dim, D); fused models hold q, k and v in one module, three times the same here
    key: Projection  # (num_key_value_heads * head_dim, D)
    value: Projection
    output: Projection  # (D, H * head_dim)
    head_dim: int
    num_heads: int
    num_key_value_heads: int
    positional: tuple[Projection, ...] = ()  # DeBERTa's relative positions, Longformer's global tokens: (H * Dh, D)
    is_cross: bool = False  # decoder over encoder
    row_order: str | None = None  # of a fused projection: BY_ROLE, BY_GROUP, or None where it is not known

    @property
    def is_fused(self) -> bool:
        return self.query is self.key

    @property
    def head_biases(self) -> tuple[str, ...]:
        """Parameters (H * head_dim,) of the module itself that are added to queries and values."""
        return tuple(name for name in HEAD_BIASES if name in self.module._parameters)

    def blocks(self, heads: Sequence[int], groups: Sequence[int]) -> list[int]:
        """Which `head_dim` rows of a fused projection, counted in such blocks, make these heads and keys and values.

        All queries, then all keys, then all values; or group after group its queries, its key and its value.
        """
        H, G = self.num_heads, self.num_key_value_heads
        if self.row_order == BY_ROLE:
            return [*heads, *(H + group for group in groups), *(H + G + group for group in groups)]
        size, found = H // max(G, 1), []
        for group in groups:
            first = group * (size + 2)
            found += [first + head % size for head in heads if head // size == group]
            found += [first + size, first + size + 1]
        return found

    @property
    def value_rows(self) -> list[int]:
        """The rows of `value` that make the values, key-value head after key-value head."""
        groups = range(self.num_key_value_heads)
        blocks = groups
        if self.is_fused:
            blocks = [self.blocks([], [group])[-1] for group in groups]
        return [block * self.head_dim + i for block in blocks for i in range(self.head_dim)]
