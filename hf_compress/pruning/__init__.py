"""What to remove, when, and by how much: importances, schedules, masks, callbacks and trainers."""

METHODS = {  # name on the command line -> (module, config, trainer)
    "blocks": ("hf_compress.pruning.blocks", "BlockPruningConfig", "BlockPruningTrainer"),
    "head-gates": ("hf_compress.pruning.hard_concrete", "HeadGatesConfig", "HeadGatesTrainer"),
    "heads": ("hf_compress.pruning.heads", "HeadPruningConfig", "HeadPruningTrainer"),
    "layers": ("hf_compress.pruning.layers", "LayerPruningConfig", "LayerPruningTrainer"),
    "neurons": ("hf_compress.pruning.neurons", "NeuronPruningConfig", "NeuronPruningTrainer"),
    "weights": ("hf_compress.pruning.weights", "WeightPruningConfig", "WeightPruningTrainer"),
}
