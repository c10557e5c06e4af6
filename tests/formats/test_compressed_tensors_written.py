"""compressed-tensors checkpoints as they are written: whatever can be read can be written, and is the same model."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.checkpoint.bits import packed_modules
from tests.helpers import tiny_batch, tiny_model

NAME = "model.layers.1.mlp.down_proj"


def with_input_ranges(model):
    """Trained a step with ranges of inputs, and packed."""
    hfc.prepare_qat(model.train(), 8, num_groups=None, embedding_bits=None, symmetric=True)
    model(**tiny_batch(model))
    return hfc.pack_qat(model.eval())


def gptq(model):
    data = [tiny_batch(model, seed=seed) for seed in range(4)]
    return hfc.quantize(model, 4, method="gptq", calibration=data, group_size=16, desc_act=True, static_groups=True)


MADE = {
    "tables": lambda model: hfc.quantize(model, 4, embedding_bits=8),
    "symmetric tables": lambda model: hfc.quantize(model, 8, embedding_bits=4, symmetric=True),
    "act-order in place": gptq,
    "each token's range": lambda model: hfc.quantize(model, 8, activation_bits=8, symmetric=True, group_size=-1),
    "asymmetric, each token's range": lambda model: hfc.quantize(model, 8, activation_bits=8, group_size=16),
    "four bits, each token's range": lambda model: hfc.quantize(model, 4, activation_bits=8, group_size=16),
    "calibrated ranges": with_input_ranges,
    "float32 scales": lambda model: hfc.quantize(model, 3, scale_dtype="float32"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
@pytest.mark.parametrize("name", MADE)
def test_what_is_written_is_read_as_the_same_model(name, tied, tmp_path):
    model = MADE[name](tiny_model("llama", tie_word_embeddings=tied))
    hfc.export(model, tmp_path, format="compressed-tensors")
    loaded, batch = hfc.load_compressed_tensors(tmp_path), tiny_batch(model)
    for own, module in packed_modules(model):
        other = loaded.get_submodule(own)
        assert torch.equal(other.dequantize(), module.dequantize()), own
        assert (other.scheme.activation_bits, other.scheme.desc_act) == (
            module.scheme.activation_bits,
            module.scheme.desc_act,
        )
    # a calibrated range is read back as scale and zero point, which round it by 2^-24
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["act-order in place", "float32 scales"])
def test_the_library_reads_the_same_weights(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model = MADE[name](tiny_model("llama", intermediate_size=64, head_dim=16))
    hfc.export(model, tmp_path, format="compressed-tensors")
    theirs = type(model).from_pretrained(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True))
    for own, module in packed_modules(model):  # the library dequantizes in the dtype of the scales
        torch.testing.assert_close(theirs.get_submodule(own).weight, module.dequantize(), rtol=2**-10, atol=0)


def test_an_order_of_columns_is_refused_as_its_readers_do(tmp_path):
    data = [tiny_batch(tiny_model("llama"), seed=seed) for seed in range(4)]
    model = hfc.quantize(tiny_model("llama"), 4, method="gptq", calibration=data, group_size=16, desc_act=True,
                         static_groups=False)  # fmt: skip
    with pytest.raises(ValueError, match="no stored act-order"):
        hfc.export(model, tmp_path, format="compressed-tensors")


def test_calibrated_inputs_by_hand(tmp_path):
    """A range from -1 to 1.55: 255 steps of 0.01, zero is the 100th, which as a signed byte is -28."""
    model = with_input_ranges(tiny_model("llama"))
    layer = model.get_submodule(NAME)
    layer.scheme = type(layer.scheme)(**{**vars(layer.scheme), "activation_range": (-1.0, 1.55)})
    hfc.export(model, tmp_path, format="compressed-tensors")
    state = load_file(tmp_path / "model.safetensors")
    assert float(state[f"{NAME}.input_scale"]) == pytest.approx(0.01)
    assert state[f"{NAME}.input_zero_point"].tolist() == [-28]
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["format"] == "int-quantized"


ODD = {
    "integer bias": (".bias", lambda t: (t * 9).int(), r"bias must hold torch.float32, but is torch.int32"),
    "bias as bytes": (".bias", lambda t: (t * 9).char(), "bias must hold torch.float32, but is torch.int8"),
    "long bias": (".bias", lambda t: torch.cat([t, t]), r"shape|size"),
    "norm of integers": (".input_layernorm.weight", lambda t: t.long(), "must hold torch.float32, but is torch.int64"),
    "integer scales": (".weight_scale", lambda t: t.int(), "weight_scale must be .* torch.int32"),
    "scales of eight bytes": (".weight_scale", lambda t: t.double(), "weight_scale must be .* torch.float64"),
    "endless inputs": (".input_scale", lambda t: t * torch.inf, "inputs must hold zero"),
    "inputs of no width": (".input_scale", lambda t: t * 0, "inputs must hold zero"),
    "inputs beyond all": (".input_scale", lambda t: t * 1e30, "reach no further"),
    "two input scales": (".input_scale", lambda t: torch.cat([t, t]), "must hold one number"),
    "fractions as zero point": (".input_zero_point", lambda t: t.float() + 0.5, "must hold one number of"),
}


@pytest.mark.parametrize(("ending", "change", "message"), ODD.values(), ids=ODD)
def test_numbers_of_another_kind_are_refused_by_name(ending, change, message, tmp_path):
    model = with_input_ranges(tiny_model("qwen2"))
    hfc.export(model, tmp_path, format="compressed-tensors")
    state = load_file(tmp_path / "model.safetensors")
    key = next(key for key in state if key.endswith(ending))
    state[key] = change(state[key])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        hfc.load_compressed_tensors(tmp_path)
