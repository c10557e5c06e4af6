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

BERT_LIKE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=64,
                 max_position_embeddings=64)  # fmt: skip
LLAMA_LIKE = dict(BERT_LIKE, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)

FAMILIES = {  # model_type -> config
    "bert": BERT_LIKE,
    "roberta": dict(BERT_LIKE, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "electra": dict(BERT_LIKE, embedding_size=32),
    "distilbert": dict(dim=32, n_layers=4, n_heads=4, hidden_dim=48, vocab_size=64, max_position_embeddings=64),
    "deberta-v2": dict(BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "modernbert": dict(BERT_LIKE, pad_token_id=0, cls_token_id=1, sep_token_id=2, local_attention=8,
                       global_attn_every_n_layers=2),
    "gpt2": dict(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=64, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2),
    "llama": LLAMA_LIKE,
    "qwen2": dict(LLAMA_LIKE, use_sliding_window=False),
    "qwen3": LLAMA_LIKE,
    "gemma3_text": dict(LLAMA_LIKE, query_pre_attn_scalar=8, sliding_window=16),
    "bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=64, pad_token_id=0,
                 bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2),
    "vit": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=16,
                patch_size=4),
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
    if family == "bart":
        return "seq2seq"
    return "clm" if family in DECODERS else "classification"


def tiny_model(family: str = "bert", task: str | None = None, *, seed: int = 0, attn: str | None = None,
               **changes) -> PreTrainedModel:  # fmt: skip
    """A random model in eval mode. `changes` go to the config, e.g. num_labels=3 or a smaller width."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
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
