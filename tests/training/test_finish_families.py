"""What training leaves open is finished in families that differ: without heads, read otherwise, with idle maps."""

import pytest
import torch
from distillation.data import rows
from helpers import CONFIGS, tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from silence import logits
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from scripts.checks.family_models import BERT_LIKE, SPECIAL

QUICK = {"begin": 0.0, "end": 0.7, "num_updates": 1}
LED = dict({k: v for k, v in CONFIGS["bart"].items() if k != "max_position_embeddings"}, attention_window=4,
           max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)  # fmt: skip
OTHERS = {
    "esm": dict(BERT_LIKE, pad_token_id=0, mask_token_id=4),
    "funnel": dict(block_sizes=[2, 2], d_model=32, n_head=4, d_head=8, d_inner=48, vocab_size=64),
    "led": LED,
    "luke": dict(BERT_LIKE, **SPECIAL, entity_vocab_size=8, entity_emb_size=8),
    "marian": dict(CONFIGS["bart"], decoder_vocab_size=64),
}
PIECES = {
    "heads": lambda: hfc.HeadPruning(0.4, **QUICK),
    "neurons": lambda: hfc.NeuronPruning(0.4, **QUICK),
    "layers": lambda: hfc.LayerPruning(0.2, share=0.5),
    "weights": lambda: hfc.WeightPruning(0.5, **QUICK),
    "blocks": lambda: hfc.BlockPruning(0.6, block_size=8, method="max", **QUICK),
    "quantized": lambda: hfc.QuantizationAware(refresh_steps=2),
}


def model_of(family: str):
    if family not in OTHERS:
        return tiny_model(family)
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if family in ("led", "marian") else AutoModelForSequenceClassification
    return kind.from_config(AutoConfig.for_model(family, **OTHERS[family])).eval()


def train(model, pieces, folder, **data):
    if "quantized" in pieces:
        hfc.prepare_qat(model, 4, embedding_bits=None)
    data = rows(12, **data)
    data = data.remove_columns("attention_mask") if model.config.model_type == "fnet" else data
    callbacks = [PIECES[piece]() for piece in pieces]
    OurTrainer(model, arguments(folder, max_steps=3), train_dataset=data, callbacks=callbacks).train()
    return model.eval()


@pytest.mark.parametrize(
    ("family", "pieces"),
    [
        ("albert", ("quantized",)), ("xlm", ("quantized",)), ("funnel", ("quantized",)),
        ("fnet", ("neurons", "layers", "blocks", "quantized")), ("convbert", ("neurons", "weights")),
        ("mobilebert", ("neurons", "layers", "weights")), ("falcon", ("blocks",)), ("marian", ("heads", "quantized")),
        ("esm", ("layers", "heads")), ("luke", ("heads", "neurons", "quantized")),
        ("led", ("neurons", "layers", "blocks", "quantized")),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)  # fmt: skip
def test_the_finished_model_is_the_trained_one(family, pieces, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_COMPRESS_CPU", "exact")
    model = model_of(family)
    model = train(model, pieces, tmp_path, kind="seq2seq" if family in ("led", "marian") else
                  "clm" if family == "falcon" else "classification").double()  # fmt: skip
    batch, size = tiny_batch(model), sum(p.numel() for p in model.parameters())
    batch = {k: v for k, v in batch.items() if family != "fnet" or k == "input_ids"}
    expected = logits(model, batch)
    hfc.finish(model)
    assert sum(p.numel() for p in model.parameters()) < size or pieces == ("neurons", "weights")
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)
    model.save_pretrained(tmp_path / "finished")
    loaded = type(model).from_pretrained(tmp_path / "finished", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-9)


def test_maps_that_no_input_reached_are_packed_and_named(tmp_path, caplog):
    """Longformer without a global token, as where it fills in words: `query_global` and its like stay idle."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("longformer", **CONFIGS["longformer"]))
    hfc.prepare_qat(model, 4, embedding_bits=None)
    with pytest.raises(ValueError, match="has no activation range yet"):
        hfc.finish(model)  # nothing was trained at all
    data, callback = rows(12, kind="mlm"), hfc.QuantizationAware()
    OurTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=data, callbacks=[callback]).train()
    expected = logits(model.eval())
    hfc.finish(model)
    assert "No input reached longformer.encoder.layer.0.attention.self.query_global in training (12 such" in caplog.text
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)
    attention = model.longformer.encoder.layer[0].attention.self
    assert attention.query_global.scheme.activation_range is None and attention.query.scheme.activation_range


def test_heads_of_entities_go_with_those_of_words():
    """LUKE has three more projections of queries; a silent head is one that may go."""
    model = model_of("luke").double()
    batch = tiny_batch(model) | {"entity_ids": torch.tensor([[1, 2]] * 3), "entity_attention_mask": torch.ones(3, 2)}
    batch["entity_position_ids"] = torch.tensor([[[1, 2], [4, -1]]] * 3)
    layer = anatomy(model).layers[1]
    assert len(layer.feed_forward.inputs) == 1 and len(layer.attention.positional) == 3
    with torch.no_grad():
        layer.attention.output.weight[:, 8:16] = 0
        layer.feed_forward.output.weight[:, 3] = 0
    expected = logits(model, batch)
    hfc.prune_neurons(hfc.prune_heads(model, {1: [1]}), {1: [3]})
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "family", "sizes"),
    [
        (AutoModelForSeq2SeqLM, "led", LED),
        (AutoModelForCausalLM, "gpt_bigcode", dict(CONFIGS["gpt2"], n_inner=48)),
        (AutoModelForCausalLM, "xglm",
         dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, vocab_size=64, **SPECIAL)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_heads_that_are_put_together_by_the_width_are_refused(kind, family, sizes):
    model = kind.from_config(AutoConfig.for_model(family, **sizes))
    with pytest.raises(ValueError, match="by the width of the model"):
        hfc.prune_heads(model, {len(anatomy(model).attentions) - 1: [0]})


def test_an_attention_that_cannot_run_without_a_head_keeps_one(tmp_path):
    """OPT's, whose heads all fell silent."""
    model = train(tiny_model("opt"), ("heads",), tmp_path, kind="clm").double()
    torch.nn.init.zeros_(anatomy(model).attentions[2].output.weight)
    expected = logits(model)
    torch.testing.assert_close(logits(hfc.finish(model)), expected, rtol=0, atol=1e-9)
    assert anatomy(model).attentions[2].num_heads == 1
    with pytest.raises(ValueError, match="cannot run without a head: keep one of its 1"):
        hfc.prune_heads(model, {2: [0]})


def test_a_model_without_one_table_of_tokens_says_so():
    """CANINE looks characters up in many small tables."""
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("canine", **BERT_LIKE))
    with pytest.raises(ValueError, match="CanineForSequenceClassification has no one table of tokens"):
        hfc.factorise_embeddings(model, 4)
    with pytest.raises(ValueError, match="CanineForSequenceClassification has no one table of tokens"):
        hfc.prune_vocabulary(model, None, keep=[5])
