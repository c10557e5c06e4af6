"""Tiny random models of every supported family, made from a config: nothing is downloaded."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from scripts.checks.family_models import CONFIGS, ENCODER_DECODERS
from scripts.checks.family_models import DECODERS as ALL_DECODERS

FAMILIES = {  # those that most tests run on; others by their name alone
    name: CONFIGS[name]
    for name in ("bert", "roberta", "electra", "distilbert", "deberta-v2", "modernbert", "gpt2", "llama", "qwen2",
                 "qwen3", "gemma3_text", "bart", "vit")
}  # fmt: skip
ENCODERS = ("bert", "roberta", "electra", "distilbert", "deberta-v2", "modernbert")
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma3_text")

TASKS = {
    "classification": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
    "clm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "image": AutoModelForImageClassification,
}


def default_task(family: str) -> str:
    if family == "vit":
        return "image"
    if family in ENCODER_DECODERS:
        return "seq2seq"
    return "clm" if family in ALL_DECODERS else "classification"


def tiny_model(family: str = "bert", task: str | None = None, *, seed: int = 0, attn: str | None = None,
               **changes) -> PreTrainedModel:  # fmt: skip
    """A random model in eval mode. `changes` go to the config, e.g. num_labels=3 or a smaller width."""
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    if attn is not None:
        config._attn_implementation = attn
    torch.manual_seed(seed)
    return TASKS[task or default_task(family)].from_config(config).eval()


def tiny_batch(
    model: PreTrainedModel, *, batch: int = 3, length: int = 10, padding: bool = True, seed: int = 1
) -> dict:
    """Inputs that `model` takes: random tokens (B, T) whose rows end in padding, or pixels for an image model."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    input_ids = torch.randint(5, 60, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padding:
        for row in range(1, batch):
            attention_mask[row, length - 2 * row :] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, 0)
    if model.config.is_encoder_decoder:
        decoder = torch.randint(5, 60, (batch, length - 2), generator=generator)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder}
    return {"input_ids": input_ids, "attention_mask": attention_mask}
