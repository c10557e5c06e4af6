"""A tiny random model of every family, and what it is fed: what `families.py` and the tests try things on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

BERT_LIKE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=64,
                 max_position_embeddings=64)  # fmt: skip
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA_LIKE = dict(BERT_LIKE, **SPECIAL, num_key_value_heads=2, head_dim=8)
T5_LIKE = dict(d_model=32, num_layers=2, num_decoder_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=64,
               pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)  # fmt: skip
XLM_LIKE = dict(emb_dim=32, n_layers=4, n_heads=4, n_words=64, vocab_size=64, max_position_embeddings=64, pad_index=0)

CONFIGS = {  # model_type -> config: encoders, decoders, encoder-decoders, pictures
    "bert": BERT_LIKE,
    "roberta": dict(BERT_LIKE, **SPECIAL),
    "electra": dict(BERT_LIKE, embedding_size=32),
    "distilbert": dict(dim=32, n_layers=4, n_heads=4, hidden_dim=48, vocab_size=64, max_position_embeddings=64),
    "deberta-v2": dict(BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "modernbert": dict(BERT_LIKE, pad_token_id=0, cls_token_id=1, sep_token_id=2, local_attention=8,
                       global_attn_every_n_layers=2),
    "albert": dict(BERT_LIKE, embedding_size=16),
    "convbert": dict(BERT_LIKE, embedding_size=32, head_ratio=2, conv_kernel_size=3),
    "deberta": dict(BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8),
    "flaubert": XLM_LIKE,
    "fnet": dict(hidden_size=32, num_hidden_layers=4, intermediate_size=48, vocab_size=64, max_position_embeddings=64),
    "longformer": dict(BERT_LIKE, attention_window=[4, 4, 8, 8], pad_token_id=0, sep_token_id=2),
    "mobilebert": dict(BERT_LIKE, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
    "mpnet": dict(BERT_LIKE, pad_token_id=1),
    "squeezebert": dict(BERT_LIKE, embedding_size=32),
    "xlm": XLM_LIKE,
    "gpt2": dict(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=64, **SPECIAL),
    "llama": LLAMA_LIKE,
    "qwen2": dict(LLAMA_LIKE, use_sliding_window=False),
    "qwen3": LLAMA_LIKE,
    "gemma3_text": dict(LLAMA_LIKE, query_pre_attn_scalar=8, sliding_window=16),
    "bloom": dict(hidden_size=32, n_layer=4, n_head=4, vocab_size=64, **SPECIAL),
    "falcon": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_hidden_size=48, vocab_size=64,
                   multi_query=True, new_decoder_architecture=False, **SPECIAL),
    "gpt_neo": dict(hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, vocab_size=64, window_size=8,
                    max_position_embeddings=64, attention_types=[[["global", "local"], 2]], **SPECIAL),
    "gpt_neox": dict(BERT_LIKE, **SPECIAL),
    "opt": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48, vocab_size=64,
                max_position_embeddings=64, word_embed_proj_dim=32, **SPECIAL),
    "phi3": dict(BERT_LIKE, **SPECIAL, num_key_value_heads=2),
    "bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=64, **SPECIAL,
                 decoder_start_token_id=2, forced_eos_token_id=2),
    "mt5": T5_LIKE,
    "t5": T5_LIKE,
    "vit": dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=16,
                patch_size=4),
}  # fmt: skip
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma3_text", "bloom", "falcon", "gpt_neo", "gpt_neox", "opt", "phi3")
ENCODER_DECODERS = ("bart", "mt5", "t5")


@dataclass(frozen=True)
class Trial:
    """A tiny random model of a family, and what it is fed."""

    family: str

    def model(self) -> PreTrainedModel:
        config = AutoConfig.for_model(self.family, **CONFIGS[self.family])
        kind = AutoModelForSequenceClassification
        if self.family in DECODERS:
            kind = AutoModelForCausalLM
        if self.family in ENCODER_DECODERS:
            kind = AutoModelForSeq2SeqLM
        if self.family == "vit":
            kind = AutoModelForImageClassification
        torch.manual_seed(0)
        return kind.from_config(config).eval()

    def batch(self, *, seed: int = 0, rows: int = 4, labels: bool = False) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.family == "vit":
            batch = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
        else:
            ids = torch.randint(6, 60, (rows, 16), generator=generator)
            mask = torch.ones_like(ids)
            if self.family != "fnet":  # it takes no mask, and mixes padding in
                mask[1, 10:] = 0
            batch = {"input_ids": ids * mask, "attention_mask": mask}
            if self.family in ENCODER_DECODERS:
                batch["decoder_input_ids"] = ids[:, :9]
            if self.family == "fnet":
                del batch["attention_mask"]
        if labels:
            is_text = self.family in (*DECODERS, *ENCODER_DECODERS)
            text = batch.pop("decoder_input_ids", batch.get("input_ids"))
            batch["labels"] = text.contiguous() if is_text else torch.arange(rows) % 2
        return batch

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, **changes: Tensor) -> Tensor:
        return model(**{**self.batch(), **changes}).logits

    @torch.no_grad()
    def last_states(self, model: PreTrainedModel) -> Tensor:
        outputs = model(**self.batch(), output_hidden_states=True)
        return (outputs.decoder_hidden_states if "decoder_hidden_states" in outputs else outputs.hidden_states)[-1]
