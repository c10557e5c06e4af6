"""Files for other readers, read back by us; `test_other_readers` lets the readers open them."""

import json

import pytest
import torch
from hf_compress_kernels.packing import unpack_gptq
from runtime_models import tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

import hf_compress as hfc
from hf_compress.commands.convert import run as convert
from hf_compress.formats.gptq import gptq_tensors, load_gptq
from tests.helpers import tiny_batch, tiny_model

WIDE = {"bert": dict(intermediate_size=64), "llama": dict(intermediate_size=64, head_dim=16),
        "gpt2": {}, "bart": dict(encoder_ffn_dim=64, decoder_ffn_dim=64)}  # fmt: skip


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("options", [dict(bits=4), dict(bits=3, symmetric=True), dict(bits=2, group_size=16)],
                         ids=["4-bit", "3-bit-symmetric", "2-bit-groups"])  # fmt: skip
def test_gptq_files_come_back_bit_for_bit(family, options, tmp_path):
    model = hfc.quantize(tiny_model(family, **WIDE[family]), **options)
    hfc.export(model, tmp_path, format="gptq")
    batch = tiny_batch(model)
    loaded = load_gptq(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    expected = "gptq" if options.get("symmetric") else "gptq_v2"
    assert json.loads((tmp_path / "quantize_config.json").read_text(encoding="utf-8"))["checkpoint_format"] == expected
    loaded.save_pretrained(tmp_path / "own")
    assert torch.equal(type(model).from_pretrained(tmp_path / "own")(**batch).logits, model(**batch).logits)


def test_act_order_and_different_bits_come_back(tmp_path):
    model = tiny_model("bert", **WIDE["bert"])
    names = [f"bert.encoder.layer.{i}.output.dense" for i in range(4)]
    data = [tiny_batch(model, batch=4, length=20, seed=s) for s in range(2)]
    hfc.quantize(model, dict(zip(names, (2, 3, 4, 8), strict=True)), method="gptq", desc_act=True, group_size=32,
                 calibration=data)  # fmt: skip
    hfc.export(model, tmp_path, format="gptq")
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert settings["dynamic"] and settings["desc_act"]
    loaded = load_gptq(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert [loaded.get_submodule(name).scheme.bits for name in names] == [2, 3, 4, 8]
    assert loaded.get_submodule(names[0]).g_idx is not None


@pytest.mark.parametrize(("checkpoint_format", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_the_tensors_are_what_the_format_says(checkpoint_format, offset):
    """A plain reading of them: w = scale * (q - zero), v1 zero points one less than meant."""
    model = hfc.quantize(tiny_model("bert", **WIDE["bert"]), 4, group_size=16)
    tensors, _ = gptq_tensors(model, checkpoint_format)
    name = "bert.encoder.layer.2.intermediate.dense"
    q = torch.stack([(tensors[f"{name}.qweight"][k // 8] >> 4 * (k % 8)) & 15 for k in range(32)], 1)  # (N, K)
    zeros = torch.stack([(tensors[f"{name}.qzeros"][:, n // 8] >> 4 * (n % 8)) & 15 for n in range(64)], 1)  # (G, N)
    groups = tensors[f"{name}.g_idx"].long()
    weight = tensors[f"{name}.scales"].float()[groups].T * (q - ((zeros + offset) & 15)[groups].T)
    assert torch.equal(weight, model.get_submodule(name).dequantize())


def test_a_wrong_label_is_seen_in_the_values(tmp_path, caplog):
    model = hfc.quantize(tiny_model("bert", **WIDE["bert"]), 4, symmetric=True)
    hfc.export(model, tmp_path, format="gptq")
    for file in ("config.json", "quantize_config.json"):
        content = json.loads((tmp_path / file).read_text(encoding="utf-8"))
        content.get("quantization_config", content).update(checkpoint_format="gptq_v2", format="gptq_v2")
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    batch = tiny_batch(model)
    assert torch.equal(load_gptq(tmp_path)(**batch).logits, model(**batch).logits)
    assert "zero points are not those of 'gptq_v2'" in caplog.text


def change(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("g_idx", lambda t: t + 99, "g_idx must lie in"),
        ("qweight", lambda t: t[:-1].contiguous(), "do not fit together"),
        ("qzeros", lambda t: t[:, :-1].contiguous(), "do not fit together"),
        ("scales", lambda t: t * torch.nan, "NaN"),
    ],
)
def test_damaged_gptq_files_are_named(part, value, message, tmp_path):
    hfc.export(hfc.quantize(tiny_model("bert", **WIDE["bert"]), 4, group_size=16), tmp_path, format="gptq")
    name = "bert.encoder.layer.1.output.dense"
    change(tmp_path, f"{name}.{part}", value)
    with pytest.raises(ValueError, match=f"encoder.layer.1.output.dense.*{message}"):
        load_gptq(tmp_path)


def test_plain_export_needs_no_plugin(tmp_path):
    model = hfc.quantize(tiny_model("bert"), 3, embedding_bits=8)
    hfc.export(model, tmp_path, format="plain")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    batch = tiny_batch(model)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)
    assert model.is_quantized  # the model itself stays packed


@pytest.mark.parametrize("bits", [2, 4, 8], ids="{}-bit".format)
def test_gemma_export_loads_with_transformers_alone(bits, tmp_path):
    model = hfc.quantize(tiny_model("bert"), bits, symmetric=True, group_size=-1)
    hfc.export(model, tmp_path, format="gemma")
    batch = tiny_batch(model)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded.bert.encoder.layer[0].output.dense).__name__ == "QuantizedLinear"
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_compressed_tensors_layout():
    from hf_compress.formats.compressed_tensors_write import compressed_tensors

    model = hfc.quantize(tiny_model("llama", **WIDE["llama"]), 3, group_size=16)
    state, settings = compressed_tensors(model)
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    assert torch.equal(state[f"{name}.weight_packed"].t(), layer.qweight)
    assert state[f"{name}.weight_scale"].shape == (32, 4) and state[f"{name}.weight_zero_point"].shape == (3, 4)
    assert state[f"{name}.weight_shape"].tolist() == [32, 64]
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert "lm_head" in settings["ignore"] and name in settings["config_groups"]["group_0"]["targets"]
    assert unpack_gptq(layer.qweight, 3, 64).shape == (32, 64)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("gptq", dict(bits=4, embedding_bits=8), "embeddings.word_embeddings"),
        ("gemma", dict(bits=3, symmetric=True, group_size=-1), "the gemma format"),
        ("gemma", dict(bits=4), "the gemma format"),
        ("compressed-tensors", dict(bits=4, grid="kmeans"), "encoder.layer.0.*no codebooks"),
        ("onnx-runtime", dict(bits=4), "format must be one of"),
    ],
)
def test_what_a_format_cannot_express_is_refused(format, options, message, tmp_path):
    model = hfc.quantize(tiny_model("bert", **WIDE["bert"]), **options)
    with pytest.raises(ValueError, match=message):
        hfc.export(model, tmp_path, format=format)


def test_a_gptq_config_says_what_is_known_of_the_model():
    """How it was made is not known of a packed model; whether its head is packed is."""
    names = ["model.layers.0.mlp.down_proj", "lm_head"]
    for packed in (names, names[:1]):
        _, config = gptq_tensors(hfc.quantize(tiny_model("llama", **WIDE["llama"]), dict.fromkeys(packed, 4)))
        assert config["lm_head"] is (len(packed) == 2)
        assert not {"damp_percent", "true_sequential"} & config.keys()


def test_an_unquantized_model_or_folder_is_refused(tmp_path):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="no packed layer"):
        hfc.export(model, tmp_path, format="gptq")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not quantized"):
        load_gptq(tmp_path)


@pytest.mark.parametrize("format", ["openvino", "onnx", "gguf", "gptq", "plain"])
def test_a_model_in_its_training_form_stays(format, tmp_path):
    model = hfc.prepare_qat(tiny_model("llama"), bits=8)
    with pytest.raises(ValueError, match=r"export would lose that: call hf_compress\.finish\(model\)"):
        hfc.export(model, tmp_path / "model", format=format)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "gemma", "plain"])
def test_a_folder_that_holds_something_stays_as_it_is(format, tmp_path):
    """A model of somebody else would be half replaced: its config gone, its other shards still there."""
    model = hfc.quantize(tiny_model("bert", **WIDE["bert"]), 4, symmetric=True, group_size=-1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="model is not empty. Choose another folder"):
        hfc.export(model, tmp_path / "model", format=format)
    assert (tmp_path / "model" / "config.json").read_bytes() == b"{}"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.parametrize("format", ["hf_compress", "gptq", "plain"])
def test_what_is_converted_is_there_whole_or_not_at_all(format, tmp_path, monkeypatch):
    model = hfc.quantize(tiny_model("bert", **WIDE["bert"]), 4, symmetric=True)
    model.save_pretrained(tmp_path / "packed")
    tiny_tokenizer().save_pretrained(tmp_path / "packed")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    command = [str(tmp_path / "packed"), str(tmp_path / "out"), "--format", format]
    with monkeypatch.context() as patched:  # what comes last
        patched.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            convert("convert", command)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert convert("convert", command) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
