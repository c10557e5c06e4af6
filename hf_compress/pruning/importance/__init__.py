"""How much each head, neuron and layer matters."""

from hf_compress.pruning.importance.heads import head_importance
from hf_compress.pruning.importance.layers import every_other, layer_importance, search_layers
from hf_compress.pruning.importance.neurons import neuron_importance

__all__ = ["every_other", "head_importance", "layer_importance", "neuron_importance", "search_layers"]
