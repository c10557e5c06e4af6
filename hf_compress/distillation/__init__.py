"""Distillation: students that learn from a teacher."""

METHODS = {  # name on the command line -> (module, config, trainer)
    "soft-targets": ("hf_compress.distillation.trainer", "DistillationConfig", "DistillationTrainer"),
    "pkd": ("hf_compress.distillation.methods.pkd", "PKDConfig", "PKDTrainer"),
    "minilm": ("hf_compress.distillation.methods.minilm", "MiniLMConfig", "MiniLMTrainer"),
    "distilbert": ("hf_compress.distillation.methods.distilbert", "DistilBertConfig", "DistilBertTrainer"),
    "word-level": ("hf_compress.distillation.methods.word_level", "WordLevelConfig", "WordLevelTrainer"),
    "scales": ("hf_compress.distillation.scales", "ScaleConfig", "ScaleTrainer"),
    "theseus": ("hf_compress.distillation.methods.theseus", "TheseusConfig", "TheseusTrainer"),
    "bert-emd": ("hf_compress.distillation.methods.bert_emd", "BertEmdConfig", "BertEmdTrainer"),
    "fsp": ("hf_compress.distillation.methods.fsp", "FSPConfig", "FSPTrainer"),
    "relational": ("hf_compress.distillation.methods.relational", "RelationalConfig", "RelationalTrainer"),
    "embeddings": (
        "hf_compress.distillation.methods.embeddings",
        "EmbeddingDistillationConfig",
        "EmbeddingDistillationTrainer",
    ),  # fmt: skip
    "tinybert": ("hf_compress.distillation.methods.tinybert", "TinyBertConfig", "TinyBertTrainer"),
}

TERMS = {  # name in a recipe -> (module, class): losses that any of them may learn besides
    "bert-emd": ("hf_compress.distillation.methods.bert_emd", "LayerTransport"),
    "distilbert": ("hf_compress.distillation.methods.distilbert", "LastStates"),
    "fsp": ("hf_compress.distillation.methods.fsp", "Flows"),
    "minilm": ("hf_compress.distillation.methods.minilm", "LastRelations"),
    "neighbour-order": ("hf_compress.distillation.methods.neighbours", "NeighbourOrder"),
    "neighbour-probabilities": ("hf_compress.distillation.methods.neighbours", "NeighbourProbabilities"),
    "pkd": ("hf_compress.distillation.methods.pkd", "PatientStates"),
    "relational": ("hf_compress.distillation.methods.relational", "ExampleRelations"),
    "sobolev": ("hf_compress.distillation.sobolev", "InputGradients"),
    "tinybert": ("hf_compress.distillation.methods.tinybert", "TinyBertLayers"),
}
