"""Distillation: students that learn from a teacher."""

METHODS = {  # name on the command line -> (module, config, trainer)
    "soft-targets": ("hf_compress.distillation.trainer", "DistillationConfig", "DistillationTrainer"),
    "pkd": ("hf_compress.distillation.pkd", "PKDConfig", "PKDTrainer"),
    "minilm": ("hf_compress.distillation.minilm", "MiniLMConfig", "MiniLMTrainer"),
    "distilbert": ("hf_compress.distillation.distilbert", "DistilBertConfig", "DistilBertTrainer"),
    "word-level": ("hf_compress.distillation.word_level", "WordLevelConfig", "WordLevelTrainer"),
    "theseus": ("hf_compress.distillation.theseus", "TheseusConfig", "TheseusTrainer"),
    "bert-emd": ("hf_compress.distillation.bert_emd", "BertEmdConfig", "BertEmdTrainer"),
    "fsp": ("hf_compress.distillation.fsp", "FSPConfig", "FSPTrainer"),
    "relational": ("hf_compress.distillation.relational", "RelationalConfig", "RelationalTrainer"),
    "tinybert": ("hf_compress.distillation.tinybert", "TinyBertConfig", "TinyBertTrainer"),
}
