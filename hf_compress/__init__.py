"""Distil, prune and quantize text models of Hugging Face Transformers, and keep them ordinary.

Names are loaded when first used, so that importing the package costs next to nothing.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import hf_compress.checkpoint.loader  # noqa: F401  registers the loader of compressed checkpoints with Transformers

try:
    __version__ = version("hf_compress")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_HOMES = {  # public name -> module that defines it
    "prune_weights": "hf_compress.pruning.one_shot",
    "allocate_bits": "hf_compress.quantization.allocation",
    "hessian_sensitivity": "hf_compress.quantization.sensitivity",
    "pack_qat": "hf_compress.quantization.qat",
    "prepare_qat": "hf_compress.quantization.qat",
    "QuantizationAware": "hf_compress.quantization.qat",
    "QBertConfig": "hf_compress.quantization.qbert",
    "QBertTrainer": "hf_compress.quantization.qbert",
    "BlockPruning": "hf_compress.pruning.blocks",
    "BlockPruningConfig": "hf_compress.pruning.blocks",
    "BlockPruningTrainer": "hf_compress.pruning.blocks",
    "HeadPruning": "hf_compress.pruning.heads",
    "HeadPruningConfig": "hf_compress.pruning.heads",
    "HeadPruningTrainer": "hf_compress.pruning.heads",
    "LayerPruning": "hf_compress.pruning.layers",
    "LayerPruningConfig": "hf_compress.pruning.layers",
    "LayerPruningTrainer": "hf_compress.pruning.layers",
    "NeuronPruning": "hf_compress.pruning.neurons",
    "NeuronPruningConfig": "hf_compress.pruning.neurons",
    "NeuronPruningTrainer": "hf_compress.pruning.neurons",
    "WeightPruning": "hf_compress.pruning.weights",
    "WeightPruningConfig": "hf_compress.pruning.weights",
    "WeightPruningTrainer": "hf_compress.pruning.weights",
    "HeadGates": "hf_compress.pruning.hard_concrete",
    "HeadGatesConfig": "hf_compress.pruning.hard_concrete",
    "HeadGatesTrainer": "hf_compress.pruning.hard_concrete",
    "export": "hf_compress.checkpoint.export",
    "load_compressed_tensors": "hf_compress.checkpoint.compressed_tensors_reader",
    "load_gptq": "hf_compress.checkpoint.gptq_format",
    "quantize": "hf_compress.quantization.quantize",
    "compiled_decoding": "hf_compress.decoding",
    "AdapterTeacher": "hf_compress.distillation.adapter_teacher",
    "distil_through_assistants": "hf_compress.distillation.assistants",
    "MutualConfig": "hf_compress.distillation.mutual",
    "MutualTrainer": "hf_compress.distillation.mutual",
    "TheseusConfig": "hf_compress.distillation.theseus",
    "TheseusTrainer": "hf_compress.distillation.theseus",
    "CachedTeacher": "hf_compress.distillation.cached_teacher",
    "cache_teacher": "hf_compress.distillation.cache",
    "DistillationConfig": "hf_compress.distillation.trainer",
    "DistillationTrainer": "hf_compress.distillation.trainer",
    "BertEmdConfig": "hf_compress.distillation.bert_emd",
    "BertEmdTrainer": "hf_compress.distillation.bert_emd",
    "DistilBertConfig": "hf_compress.distillation.distilbert",
    "DistilBertTrainer": "hf_compress.distillation.distilbert",
    "FSPConfig": "hf_compress.distillation.fsp",
    "FSPTrainer": "hf_compress.distillation.fsp",
    "MiniLMConfig": "hf_compress.distillation.minilm",
    "MiniLMTrainer": "hf_compress.distillation.minilm",
    "PKDConfig": "hf_compress.distillation.pkd",
    "PKDTrainer": "hf_compress.distillation.pkd",
    "WordLevelConfig": "hf_compress.distillation.word_level",
    "WordLevelTrainer": "hf_compress.distillation.word_level",
    "RelationalConfig": "hf_compress.distillation.relational",
    "RelationalTrainer": "hf_compress.distillation.relational",
    "generate_targets": "hf_compress.distillation.sequence_level",
    "SelfDistillationConfig": "hf_compress.distillation.self_distillation",
    "SelfDistillationTrainer": "hf_compress.distillation.self_distillation",
    "TinyBertConfig": "hf_compress.distillation.tinybert",
    "TinyBertTrainer": "hf_compress.distillation.tinybert",
    "augment": "hf_compress.distillation.augmentation",
    "make_student": "hf_compress.distillation.students",
    "anatomy": "hf_compress.anatomy",
    "capture": "hf_compress.capture",
    "compare": "hf_compress.report.compare",
    "measure": "hf_compress.measure",
    "model_card": "hf_compress.report.card",
    "prune_heads": "hf_compress.surgery.heads",
    "prune_layers": "hf_compress.surgery.layers",
    "prune_neurons": "hf_compress.surgery.neurons",
    "head_importance": "hf_compress.pruning.importance.heads",
    "layer_importance": "hf_compress.pruning.importance.layers",
    "neuron_importance": "hf_compress.pruning.importance.neurons",
    "prune_vocabulary": "hf_compress.surgery.vocabulary",
    "used_tokens": "hf_compress.surgery.tokenizer",
    "factorise_embeddings": "hf_compress.pruning.embeddings",
    "to_block_sparse": "hf_compress.pruning.block_sparse",
    "merge_neurons": "hf_compress.surgery.merging",
    "prune": "hf_compress.pruning.budget",
    "Recipe": "hf_compress.recipe.recipe",
    "publish": "hf_compress.hub",
    "push_to_hub": "hf_compress.hub",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Some public names are those of the modules that define them; here the name means the function, always."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # what an import of the module would set
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
