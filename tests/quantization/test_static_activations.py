"""One grid for the inputs of a layer, over the range that they have in the calibration, without training."""

import pytest
import torch
from helpers import tiny_batch, tiny_model
from silence import logits
from torch import nn

import hf_compress as hfc
from hf_compress.layers.packed_linear import PackedLinear

SETTINGS = dict(symmetric=True, group_size=-1, activation_bits=8, static_activations=True)


def rows(model, number: int = 20) -> list[dict]:
    batch = tiny_batch(model, batch=number, padding=False, seed=5)
    return [{name: value[i].tolist() for name, value in batch.items()} for i in range(number)]


def seen_by_hand(model, name: str, batch_size: int = 8) -> tuple[float, float]:
    """The mean over batches of the least and of the largest input, each with zero."""
    ends, module = [], model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: ends.append((args[0].min().item(), args[0].max().item())))
    batch = tiny_batch(model, batch=20, padding=False, seed=5)
    with torch.no_grad():
        for start in range(0, 20, batch_size):
            model(**{key: value[start : start + batch_size] for key, value in batch.items()})
    handle.remove()
    low, high = (sum(end) / len(ends) for end in zip(*ends, strict=True))
    return min(low, 0.0), max(high, 0.0)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "bart"])
def test_ranges_are_the_mean_ends_and_inputs_lie_on_their_grid(family, tmp_path):
    model = tiny_model(family)
    maps = [n for n, m in model.named_modules() if ".0." in n and isinstance(m, nn.Linear)]
    expected = {name: seen_by_hand(model, name) for name in maps}
    hfc.quantize(model, 8, calibration=rows(model), **SETTINGS)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert expected.keys() <= packed.keys() or family == "gpt2"
    for name, ends in expected.items():
        assert packed[name].scheme.activation_range == pytest.approx(ends, abs=1e-5)
    for layer in packed.values():
        x = torch.randn(3, layer.in_features)
        low, high = layer.scheme.activation_range
        scale = torch.tensor(high - low, dtype=torch.float32).double() / 255
        zero = (-low / scale).round()
        rounded = ((x.double() / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        y = rounded @ layer.dequantize(torch.float64).t() + (0 if layer.bias is None else layer.bias.double())
        with torch.no_grad():
            torch.testing.assert_close(layer(x).double(), y, rtol=2e-2, atol=2e-2 * float(y.abs().max()))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(again, tiny_batch(model)), logits(model, tiny_batch(model)))


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_methods_that_calibrate_anyway_find_them_too(method):
    model, plain = tiny_model("bert"), tiny_model("bert")
    hfc.quantize(model, 8, method=method, calibration=rows(model), **SETTINGS)
    hfc.quantize(plain, 8, calibration=rows(plain), **SETTINGS)
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            assert layer.scheme == plain.get_submodule(name).scheme  # of the float model


def test_what_lacks_data_or_sees_no_input_is_refused_by_name():
    model = tiny_model("bert")
    for given in (dict(activation_bits=None), dict(calibration=None)):
        with pytest.raises(ValueError, match="give activation_bits=8 and `calibration`"):
            hfc.quantize(model, 8, **{"calibration": rows(model), **SETTINGS, **given})
    with pytest.raises(ValueError, match="calibration only with grid='kmeans' or static_activations"):
        hfc.quantize(model, 8, calibration=rows(model))
    broken = tiny_model("bert")
    with torch.no_grad():
        broken.bert.encoder.layer[1].attention.output.LayerNorm.weight.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"encoder\.layer\.1\.intermediate\.dense: The range of a layer's 8-bit inputs"
    ):
        hfc.quantize(broken, 8, calibration=rows(broken), **SETTINGS)
    assert not any(isinstance(module, PackedLinear) for module in broken.modules())
    bart = tiny_model("bart")
    alone = [{name: row[name] for name in ("input_ids",)} for row in rows(bart)]
    with pytest.raises(ValueError, match="decoder"):
        hfc.quantize(bart, 8, calibration=alone, **SETTINGS)
