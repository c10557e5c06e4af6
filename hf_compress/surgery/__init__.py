"""Cuts heads, neurons, layers and tokens out of a model, physically and exactly."""

from hf_compress.surgery.heads import prune_heads
from hf_compress.surgery.layers import prune_layers
from hf_compress.surgery.merging import merge_neurons
from hf_compress.surgery.neurons import prune_neurons
from hf_compress.surgery.vocabulary import prune_vocabulary

__all__ = ["merge_neurons", "prune_heads", "prune_layers", "prune_neurons", "prune_vocabulary"]
