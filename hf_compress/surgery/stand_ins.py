"""Stand-ins for what cannot run on nothing, so that a layer may lose all its heads or neurons."""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_compress.model.classes import plain_class

WITHOUT_HEADS = "without_heads"  # among the attention functions of Transformers
BIAS_TABLE = "relative_attention_bias"  # of T5's first layers, for all that follow
COUNTS_HEADS = ("DisentangledSelfAttention",)  # DeBERTa-v2 splits a width into a number of heads: not into zero
NEEDS_A_HEAD = ("MultiHeadAttention", "OPTAttention")  # the first of XLM and FlauBERT
READS_CONFIG = ("Phi3Attention",)  # where the queries end is told by the config


class HeadlessAttention(nn.Module):
    """An attention without heads. It returns no context, and its projections stay its children, under their names."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.attention_head_size = attention.attention_head_size
        self.num_attention_heads = self.all_head_size = 0

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        return hidden_states[..., :0], None  # (B, T, 0)


def attend_without_heads(module: nn.Module, query: Tensor, key: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """The context (B, T, 0, Dh) and probabilities (B, 0, T, S) of no heads; the query is (B, 0, T, Dh).

    The fused kernels of attention divide by the number of heads, and some end the process where that is zero.
    """
    return query.transpose(1, 2), query @ key.mT


AttentionInterface.register(WITHOUT_HEADS, attend_without_heads)


class ConfigOfSomeHeads:
    """What an attention module reads its number of heads from; all else is the model's config, whatever it becomes."""

    def __init__(self, config: PreTrainedConfig, num_heads: int):
        self.shared, self.num_attention_heads = config, num_heads

    def __getattr__(self, name: str) -> Any:
        if name == "shared":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.shared, name)


def config_of_heads(module: nn.Module, num_heads: int) -> Any:
    """The config that an attention module with `num_heads` heads must have to run; None if its own will do.

    One that lost all its heads attends without, whatever attention the model runs elsewhere.
    """
    config = getattr(module, "config", None)
    if config is None or (num_heads and plain_class(module).__name__ not in READS_CONFIG):
        return None
    config = getattr(config, "shared", config)
    if not num_heads:
        config = copy.deepcopy(config)
        config._attn_implementation = WITHOUT_HEADS
    return ConfigOfSomeHeads(config, num_heads) if plain_class(module).__name__ in READS_CONFIG else config


class BiasConv1D(Conv1D):
    """GPT-2's linear map once it has no inputs left: its bias, wherever it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], self.nf)


def linear_class(module: nn.Module, num_inputs: int) -> type:
    """The class that `module`, a linear map, must have to run with `num_inputs` input columns."""
    if not isinstance(module, Conv1D):
        return type(module)
    return Conv1D if num_inputs else BiasConv1D
