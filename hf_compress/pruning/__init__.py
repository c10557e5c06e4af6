"""What to remove, when, and by how much: importances, schedules, masks, callbacks and trainers."""

METHODS = {  # name on the command line -> (module, config, trainer)
    "blocks": ("hf_compress.pruning.methods.blocks", "BlockPruningConfig", "BlockPruningTrainer"),
    "head-gates": ("hf_compress.pruning.methods.head_gates", "HeadGatesConfig", "HeadGatesTrainer"),
    "heads": ("hf_compress.pruning.methods.heads", "HeadPruningConfig", "HeadPruningTrainer"),
    "layers": ("hf_compress.pruning.methods.layers", "LayerPruningConfig", "LayerPruningTrainer"),
    "neurons": ("hf_compress.pruning.methods.neurons", "NeuronPruningConfig", "NeuronPruningTrainer"),
    "rank-gates": ("hf_compress.pruning.methods.rank_gates", "RankGatesConfig", "RankGatesTrainer"),
    "weights": ("hf_compress.pruning.methods.weights", "WeightPruningConfig", "WeightPruningTrainer"),
}
