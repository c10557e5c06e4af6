"""Packed models saved and loaded again: the same logits bit for bit, on every family."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MPNetModel,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_compress as hfc
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear
from tests.helpers import CONFIGS, FAMILIES, tiny_batch, tiny_model


def saved(model, folder, **options):
    hfc.quantize(model, **options)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_exact(family, tmp_path):
    model = tiny_model(family)
    batch = tiny_batch(model)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".0." in n or "h.0.attn" in n]
    mixed = {name: (2, 3, 4, 8)[i % 4] for i, name in enumerate(names) if hasattr(model.get_submodule(name), "weight")}
    saved(model, tmp_path, bits=mixed, group_size=16)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    widths = {n: m.scheme.bits for n, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert widths == mixed


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gemma3_text", "modernbert"])
def test_embeddings_and_tied_heads_round_trip(family, tmp_path):
    task = "mlm" if family in ("bert", "modernbert") else "clm"
    model = tiny_model(family, task, tie_word_embeddings=True)
    batch = tiny_batch(model)
    saved(model, tmp_path, bits=4, embedding_bits=8)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.tie_weights()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded.dequantize()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is table.weight
    loaded.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    assert torch.equal(again(**batch).logits, loaded(**batch).logits)


T5 = dict(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0,
          tie_word_embeddings=True)  # fmt: skip


def tiny_encoder_decoder(family):
    if family == "bart":
        return tiny_model("bart", scale_embedding=True)
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5)).eval()


@pytest.mark.parametrize(("family", "others"), [
    ("bart", ["lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"]),
    ("t5", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"]),
], ids=["bart", "t5"])  # fmt: skip
def test_one_table_for_encoder_decoder_and_head_is_packed_once(family, others, tmp_path):
    model = tiny_encoder_decoder(family)
    batch, name = tiny_batch(model), "model.shared" if family == "bart" else "shared"
    rounded = tiny_encoder_decoder(family)
    saved(model, tmp_path / "packed", bits=8, embedding_bits=4)
    for layer, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            rounded.get_submodule(layer).weight.data.copy_(module.dequantize())
    torch.testing.assert_close(model(**batch).logits, rounded(**batch).logits)
    model.tie_weights()
    names = load_file(tmp_path / "packed" / "model.safetensors").keys()
    assert f"{name}.qweight" in names and not [key for key in names if key.startswith(tuple(others))]
    loaded = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded.dequantize()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert all(loaded.get_submodule(other).weight is loaded.get_submodule(name).weight for other in others)
    assert loaded.all_tied_weights_keys == rounded.all_tied_weights_keys
    loaded.save_pretrained(tmp_path / "plain")
    assert torch.equal(type(model).from_pretrained(tmp_path / "plain")(**batch).logits, loaded(**batch).logits)
    with pytest.raises(ValueError, match=f"{others[1]} shares its weight with {name}"):
        hfc.quantize(tiny_encoder_decoder(family), {others[1]: 4})


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_width_loads_and_predicts_as_its_dequantized_twin(family, bits, tmp_path):
    model = saved(tiny_model(family), tmp_path, bits=bits, group_size=16, embedding_bits=bits)
    loaded, twin = (type(model).from_pretrained(tmp_path) for _ in range(2))
    twin.dequantize()
    assert any(isinstance(m, PackedLinear) for m in loaded.modules())
    assert not any(isinstance(m, (PackedLinear, PackedEmbedding)) for m in twin.modules())
    batch = tiny_batch(model)
    assert torch.equal(loaded(**batch).logits, twin(**batch).logits)


WIDE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)  # large enough for the CPU's engines


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_engines_predict_as_the_dequantized_twin(family, tmp_path):
    changes = WIDE if family == "bert" else dict(WIDE, head_dim=32)
    for bits in (2, 3, 4, 8):
        model = saved(tiny_model(family, **changes), tmp_path / str(bits), bits=bits)
        loaded, twin = (type(model).from_pretrained(tmp_path / str(bits)) for _ in range(2))
        assert any(m.route is not None for m in loaded.modules() if isinstance(m, PackedLinear))
        twin.dequantize()
        batch = tiny_batch(model)
        expected = twin(**batch).logits
        error = (loaded(**batch).logits - expected).norm() / expected.norm()
        assert error < 0.02, bits  # inputs of 8 bits in some engines, bfloat16 in others


def test_other_task_classes_find_their_modules(tmp_path):
    model = saved(tiny_model("bert"), tmp_path, bits={"bert.encoder.layer.0.output.dense": 4, "classifier": 8})
    backbone = AutoModel.from_pretrained(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(backbone(**batch).last_hidden_state, model.bert(**batch).last_hidden_state)
    assert isinstance(backbone.encoder.layer[0].output.dense, PackedLinear)


def test_a_stock_load_fails_loudly(tmp_path):
    saved(tiny_model("bert"), tmp_path, bits=4)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]  # what a Transformers without the plugin makes of it
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RuntimeError):
        BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        BertModel.from_pretrained(tmp_path)


def test_quantizing_one_model_leaves_its_config_twin_alone(tmp_path):
    model = tiny_model("bert")
    other = BertForSequenceClassification(model.config)
    hfc.quantize(model, 4)
    other.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))


def test_casting_keeps_scales_and_follows_the_dtype(tmp_path):
    model = saved(tiny_model("llama"), tmp_path, bits=4)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    packed = loaded.model.layers[0].mlp.down_proj
    assert packed.scales.dtype == torch.float16 and packed.weight.dtype == torch.bfloat16
    assert loaded(**tiny_batch(loaded)).logits.dtype == torch.bfloat16
    model.to(torch.float64)
    assert model.model.layers[0].mlp.down_proj.scales.dtype == torch.float16
    assert model(**tiny_batch(model)).logits.dtype == torch.float64


def test_compiles_without_graph_breaks():
    model = hfc.quantize(tiny_model("llama"), 3, group_size=8)
    batch = tiny_batch(model, padding=False)
    expected = model(**batch, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)


def test_an_adapter_trains_and_a_merge_that_would_lose_it_raises(tmp_path):
    peft = pytest.importorskip("peft")
    model = hfc.quantize(tiny_model("llama"), 4)
    batch = tiny_batch(model)
    base = model(**batch).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad is not None
    changed = adapted(**batch).logits
    assert not torch.allclose(changed, base)
    with pytest.raises(RuntimeError, match="read-only"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r["bits"]["encoder.layer.0.output.dense"].update(bits=5), "bits must be one of"),
        (lambda r: r["bits"]["encoder.layer.0.output.dense"].update(group_size=7), "group_size must divide"),
        (lambda r: r["bits"].update({"encoder.layer.9.output.dense": {"bits": 4}}), "lacks"),
        (lambda r: r["bits"].update({"encoder.layer.0.output.LayerNorm": {"bits": 4}}), "LayerNorm"),
        (lambda r: r["bits"]["encoder.layer.0.output.dense"].update(colour=1), "must hold bits"),
    ],
    ids=["bits", "groups", "missing-module", "not-linear", "unknown-field"],
)
def test_a_damaged_record_is_named(damage, message, tmp_path):
    saved(tiny_model("bert"), tmp_path, bits=4)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    damage(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(("part", "value", "message"), [("scales", torch.nan, "NaN"), ("g_idx", 99, "g_idx must lie")])
def test_damaged_tensors_are_named(part, value, message, tmp_path):
    model = tiny_model("bert")
    calibration = [tiny_batch(model, batch=8, length=16, padding=False)]
    saved(model, tmp_path, bits=4, method="gptq", desc_act=True, group_size=16, calibration=calibration)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"bert.encoder.layer.1.output.dense.{part}"].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"encoder.layer.1.output.dense.*{message}"):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "options", "value", "message"), [
    ("bert.embeddings.word_embeddings.zeros", dict(bits=4, embedding_bits=3), 8, r"zeros must lie in \[0, 7\], got 8"),
    ("bert.encoder.layer.1.output.dense.levels", dict(bits=2, grid="kmeans"), torch.inf, "NaN or infinity"),
], ids=["zero-points", "levels"])  # fmt: skip
def test_values_out_of_range_are_named(name, options, value, message, tmp_path):
    saved(tiny_model("bert"), tmp_path, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name.removeprefix('bert.').rpartition('.')[0]}.*{message}"):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [BertModel, RobertaModel, MPNetModel], ids=lambda kind: kind.__name__)
def test_a_backbone_saved_without_its_pooler_opens_as_any_model(kind, tmp_path):
    config = kind.config_class(**CONFIGS[kind.config_class.model_type])
    bits = {f"encoder.layer.{i}.intermediate.dense": 4 for i in range(4)}
    model = hfc.quantize(kind(config, add_pooling_layer=False).eval(), bits)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert loaded.pooler is not None  # new, as with any checkpoint
    rewrite(tmp_path, lambda tensors: tensors.pop("encoder.layer.1.intermediate.dense.qweight"))
    with pytest.raises(ValueError, match="encoder.layer.1.intermediate.dense.qweight is in none of"):
        AutoModel.from_pretrained(tmp_path)


def test_half_a_pooler_is_damage(tmp_path):
    hfc.quantize(BertModel(BertConfig(**CONFIGS["bert"])).eval(), 4).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("pooler.dense.bias"))
    with pytest.raises(ValueError, match="pooler.dense.bias is in none of"):
        AutoModel.from_pretrained(tmp_path)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
