"""Scales that float16 cannot hold are float32, in the modules that need it."""

import pytest
import torch
from helpers import tiny_batch, tiny_model

import hf_compress as hfc
from hf_compress.checkpoint.bits import packed_modules
from hf_compress.model.anatomy import matrix
from hf_compress.quantization.fake_quantize import WeightQuantizer
from hf_compress.quantization.grids import fits_float16, grid_from_range, smallest_scale

QUERY = "bert.encoder.layer.1.attention.self.query"
LATER = "bert.encoder.layer.3.output.dense"
METHODS = {
    "rtn": dict(),
    "gptq": dict(method="gptq", bits={QUERY: 4, LATER: 4}),  # before it nothing: other inputs may round otherwise
    "ternary": dict(grid="ternary", bits=2),
    "kmeans": dict(grid="kmeans"),
}


def scaled(factor: float) -> torch.nn.Module:
    """A BERT with one weight `factor` times as large."""
    model = tiny_model("bert")
    with torch.no_grad():
        matrix(model.get_submodule(QUERY)).mul_(factor)
    return model


def quantized(model: torch.nn.Module, method: str, **options) -> torch.nn.Module:
    options = {**METHODS[method], **options}
    if method == "gptq":
        options["calibration"] = [tiny_batch(model, seed=seed) for seed in range(4)]
    return hfc.quantize(model, options.pop("bits", 4), **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-40, -25, -16, 27], ids="2^{}".format)
def test_a_weight_of_any_size_is_rounded_as_its_like(exponent, method, tmp_path):
    """By a power of two nothing is rounded: the packed weight is as many times larger, to the last bit."""
    plain, other = quantized(scaled(1.0), method, scale_dtype="float32"), quantized(scaled(2.0**exponent), method)
    expected = plain.get_submodule(QUERY).dequantize() * 2.0**exponent
    found = other.get_submodule(QUERY).dequantize()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    kinds = {name: module.scheme.scale_dtype for name, module in packed_modules(other)}
    assert {name for name, kind in kinds.items() if kind == "float32"} == {QUERY}, "the others keep float16"
    other.save_pretrained(tmp_path)
    loaded = type(other).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_submodule(QUERY).dequantize(), found)


def test_tables_too():
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.mul_(1e-9)
    table = model.bert.embeddings.token_type_embeddings.weight.detach().clone()
    hfc.quantize(model, 8, embedding_bits=8)
    packed = model.bert.embeddings.token_type_embeddings
    assert packed.scheme.scale_dtype == "float32"
    assert model.bert.embeddings.word_embeddings.scheme.scale_dtype == "float16"
    assert (packed.dequantize() - table).abs().max() <= (table.amax() - table.amin()) / 255


def test_float16_that_was_asked_for_is_refused_where_it_does_not_hold():
    for factor in (2.0**-25, 2.0**27):
        with pytest.raises(ValueError, match=f"{QUERY}: float16 cannot hold"):
            quantized(scaled(factor), "rtn", scale_dtype="float16")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_float16_holds_what_moves_the_grid_by_less_than_half_a_step(bits):
    """By hand: steps of float16 near zero are 2^-24, so it rounds by 2^-25 at most; half a step of the grid's end is
    scale / 2 of scale (2^bits - 1), which 2^(bits - 24) leaves room for."""
    least = 2.0 ** (bits - 24) / 0.43
    values = torch.linspace(0, 1, 64)[None] * (2**bits - 1)  # scale 1
    assert fits_float16(values * least * 1.001, bits) and not fits_float16(values * least * 0.999, bits)
    for scale in (2.0 ** (bits - 24) * (1 + k / 7) for k in range(7)):
        stored = float(torch.tensor(scale).half())
        assert abs(stored - scale) * (2**bits - 1) <= scale / 2
    assert fits_float16(values * 32752, bits) and not fits_float16(values * 32753, bits)


def test_the_smallest_scale_is_that_of_the_dtype():
    assert smallest_scale(torch.float16) == float(torch.tensor([1], dtype=torch.int16).view(torch.float16))
    low, high = torch.tensor([-1e-30]), torch.tensor([2e-30])
    scale, zero = grid_from_range(low, high, 2)
    torch.testing.assert_close(scale, torch.tensor([1e-30]))
    assert zero.item() == 1


@pytest.mark.parametrize("learned", [False, True], ids=["chosen", "learned"])
@pytest.mark.parametrize("exponent", [-40, -20, 27], ids="2^{}".format)
def test_training_uses_the_scale_that_is_stored(exponent, learned):
    torch.manual_seed(0)
    weight = torch.randn(8, 32)
    plain = WeightQuantizer(weight, 8, learned=learned).eval()
    other = WeightQuantizer(weight * 2.0**exponent, 8, learned=learned).eval()
    assert other.scheme().scale_dtype == "float32"
    found = other(weight * 2.0**exponent)
    assert torch.equal(found, other.quantize(weight * 2.0**exponent).dequantize())
    # float16 rounds the other's scale by 2^-11
    torch.testing.assert_close(found, plain(weight) * 2.0**exponent, rtol=0.01, atol=float(found.abs().max()) / 127)


def test_a_small_scale_is_not_lifted_to_the_smallest_normal_number():
    """4 bits: a scale of 3e-6 lies among float16's subnormal numbers, which hold it within 1%."""
    weight = torch.arange(16.0)[None] * 3e-6
    quantizer = WeightQuantizer(weight, 4, range_method="minmax").eval()
    assert quantizer.scheme().scale_dtype == "float16"
    assert float(quantizer.stored_scale()) == pytest.approx(3e-6, rel=0.01)
    torch.testing.assert_close(quantizer(weight), weight, rtol=0.02, atol=0)


def test_a_grid_that_float16_held_moves_to_float32_when_the_weight_shrinks():
    quantizer = WeightQuantizer(torch.randn(4, 16), 8)
    assert quantizer.scheme().scale_dtype == "float16"
    quantizer.refresh(torch.randn(4, 16) * 1e-9)
    assert quantizer.scheme().scale_dtype == "float32"
