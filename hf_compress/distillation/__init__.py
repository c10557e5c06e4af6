"""Distillation: students that learn from a teacher."""

METHODS = {  # name on the command line -> (module, config, trainer)
    "soft-targets": ("hf_compress.distillation.trainer", "DistillationConfig", "DistillationTrainer"),
    "tinybert": ("hf_compress.distillation.tinybert", "TinyBertConfig", "TinyBertTrainer"),
}
