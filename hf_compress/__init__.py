"""Distil, prune and quantize text models of Hugging Face Transformers, and keep them ordinary.

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from importlib import import_module

import hf_compress.checkpoint.loader  # noqa: F401  registers the loader of compressed checkpoints with Transformers
from hf_compress.version import __version__  # noqa: F401

_HOMES = {  # public name -> module that defines it
    "prune_weights": "hf_compress.pruning.one_shot",
    "allocate_bits": "hf_compress.quantization.allocation",
    "hessian_sensitivity": "hf_compress.quantization.sensitivity",
    "pack_qat": "hf_compress.quantization.qat",
    "prepare_qat": "hf_compress.quantization.qat",
    "QuantizationAware": "hf_compress.quantization.qat",
    "QBertConfig": "hf_compress.quantization.qbert",
    "QBertTrainer": "hf_compress.quantization.qbert",
    "BlockPruning": "hf_compress.pruning.methods.blocks",
    "BlockPruningConfig": "hf_compress.pruning.methods.blocks",
    "BlockPruningTrainer": "hf_compress.pruning.methods.blocks",
    "HeadPruning": "hf_compress.pruning.methods.heads",
    "HeadPruningConfig": "hf_compress.pruning.methods.heads",
    "HeadPruningTrainer": "hf_compress.pruning.methods.heads",
    "LayerPruning": "hf_compress.pruning.methods.layers",
    "LayerPruningConfig": "hf_compress.pruning.methods.layers",
    "LayerPruningTrainer": "hf_compress.pruning.methods.layers",
    "NeuronPruning": "hf_compress.pruning.methods.neurons",
    "NeuronPruningConfig": "hf_compress.pruning.methods.neurons",
    "NeuronPruningTrainer": "hf_compress.pruning.methods.neurons",
    "WeightPruning": "hf_compress.pruning.methods.weights",
    "WeightPruningConfig": "hf_compress.pruning.methods.weights",
    "WeightPruningTrainer": "hf_compress.pruning.methods.weights",
    "HeadGates": "hf_compress.pruning.methods.head_gates",
    "HeadGatesConfig": "hf_compress.pruning.methods.head_gates",
    "HeadGatesTrainer": "hf_compress.pruning.methods.head_gates",
    "Rewinding": "hf_compress.pruning.rewinding",
    "finish": "hf_compress.training.finish",
    "export": "hf_compress.formats.export",
    "load_compressed_tensors": "hf_compress.formats.compressed_tensors.read",
    "load_gptq": "hf_compress.formats.gptq",
    "quantize": "hf_compress.quantization.quantize",
    "compiled_decoding": "hf_compress.model.decoding",
    "AdapterTeacher": "hf_compress.distillation.teachers.adapter_teacher",
    "distil_through_assistants": "hf_compress.distillation.methods.assistants",
    "MutualConfig": "hf_compress.distillation.methods.mutual",
    "MutualTrainer": "hf_compress.distillation.methods.mutual",
    "TheseusConfig": "hf_compress.distillation.methods.theseus",
    "TheseusTrainer": "hf_compress.distillation.methods.theseus",
    "CachedTeacher": "hf_compress.distillation.teachers.cached_teacher",
    "cache_teacher": "hf_compress.distillation.teachers.cache",
    "Term": "hf_compress.distillation.terms",
    "TermOptions": "hf_compress.distillation.terms",
    "Phase": "hf_compress.distillation.phases",
    "Hints": "hf_compress.distillation.methods.hints",
    "PatientStates": "hf_compress.distillation.methods.pkd",
    "Flows": "hf_compress.distillation.methods.fsp",
    "LastStates": "hf_compress.distillation.methods.distilbert",
    "LastRelations": "hf_compress.distillation.methods.minilm",
    "LayerTransport": "hf_compress.distillation.methods.bert_emd",
    "TinyBertLayers": "hf_compress.distillation.methods.tinybert",
    "ExampleRelations": "hf_compress.distillation.methods.relational",
    "EmbeddingDistillationConfig": "hf_compress.distillation.methods.embeddings",
    "EmbeddingDistillationTrainer": "hf_compress.distillation.methods.embeddings",
    "SentenceVectors": "hf_compress.distillation.methods.embeddings",
    "DistillationConfig": "hf_compress.distillation.config",
    "DistillationTrainer": "hf_compress.distillation.trainer",
    "BertEmdConfig": "hf_compress.distillation.methods.bert_emd",
    "BertEmdTrainer": "hf_compress.distillation.methods.bert_emd",
    "DistilBertConfig": "hf_compress.distillation.methods.distilbert",
    "DistilBertTrainer": "hf_compress.distillation.methods.distilbert",
    "FSPConfig": "hf_compress.distillation.methods.fsp",
    "FSPTrainer": "hf_compress.distillation.methods.fsp",
    "MiniLMConfig": "hf_compress.distillation.methods.minilm",
    "MiniLMTrainer": "hf_compress.distillation.methods.minilm",
    "PKDConfig": "hf_compress.distillation.methods.pkd",
    "PKDTrainer": "hf_compress.distillation.methods.pkd",
    "WordLevelConfig": "hf_compress.distillation.methods.word_level",
    "WordLevelTrainer": "hf_compress.distillation.methods.word_level",
    "RelationalConfig": "hf_compress.distillation.methods.relational",
    "RelationalTrainer": "hf_compress.distillation.methods.relational",
    "generate_targets": "hf_compress.distillation.texts.sequence_level",
    "SelfDistillationConfig": "hf_compress.distillation.methods.self_distillation",
    "SelfDistillationTrainer": "hf_compress.distillation.methods.self_distillation",
    "TinyBertConfig": "hf_compress.distillation.methods.tinybert",
    "TinyBertTrainer": "hf_compress.distillation.methods.tinybert",
    "augment": "hf_compress.distillation.texts.augmentation",
    "make_student": "hf_compress.distillation.students",
    "anatomy": "hf_compress.model.anatomy",
    "capture": "hf_compress.model.capture",
    "compare": "hf_compress.report.compare",
    "measure": "hf_compress.measuring.measure",
    "model_card": "hf_compress.report.card",
    "prune_heads": "hf_compress.surgery.heads",
    "prune_layers": "hf_compress.surgery.layers",
    "prune_neurons": "hf_compress.surgery.neurons",
    "head_importance": "hf_compress.pruning.importance.heads",
    "layer_importance": "hf_compress.pruning.importance.layers",
    "neuron_importance": "hf_compress.pruning.importance.neurons",
    "prune_vocabulary": "hf_compress.surgery.vocabulary",
    "used_tokens": "hf_compress.surgery.tokenizer",
    "factorise": "hf_compress.pruning.low_rank",
    "factorise_embeddings": "hf_compress.pruning.embeddings",
    "to_block_sparse": "hf_compress.pruning.block_sparse",
    "merge_neurons": "hf_compress.surgery.merging",
    "prune": "hf_compress.pruning.budget",
    "Recipe": "hf_compress.recipe.recipe",
    "publish": "hf_compress.publishing.hub",
    "push_to_hub": "hf_compress.publishing.hub",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__version__"])
