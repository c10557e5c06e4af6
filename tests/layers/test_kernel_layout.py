"""On a GPU a packed layer keeps its words once, in the kernels' order. Here the CPU plays the GPU."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.engines import gpu, processor
from hf_compress.layers.packed_blocks import PackedBlocksLinear
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.measuring.counting import num_parameters, num_weights
from tests.engines.test_routes import SCHEMES, K, packed_layer
from tests.helpers import tiny_batch, tiny_model

INT8 = WeightScheme(8, symmetric=True, activation_bits=8)
LAYERS = {**SCHEMES, "int8": INT8}
BYTES = {2: 0.32, 3: 0.45, 4: 0.57, 8: 1.07}  # a weight, with groups of 128


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, "exact")
    monkeypatch.setattr(gpu, "takes", lambda device: True)


@pytest.fixture
def twins(request, monkeypatch):
    """A layer on a CPU, and the same on what plays the GPU."""
    layer = packed_layer(LAYERS[request.param])
    request.getfixturevalue("on_gpu")
    return layer, packed_layer(LAYERS[request.param])


every_layer = pytest.mark.parametrize("twins", LAYERS, indirect=True)


def words(layer: PackedLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for one in value for tensor in tensors_of(one)]
    return [tensor for one in vars(value).values() for tensor in tensors_of(one)] if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("bits", BYTES)
def test_bytes_of_a_layer(bits, on_gpu):
    """All that the layer holds: what is stored and what the kernels read."""
    layer = PackedLinear(2048, 2048, WeightScheme(bits, 128), bias=False, dtype=torch.float16)
    layer.fill(torch.randint(0, 2**bits, (2048, 2048), dtype=torch.uint8), torch.rand(16, 2048) + 0.1,
               torch.zeros(16, 2048, dtype=torch.uint8))  # fmt: skip
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*layer.buffers(), *tensors_of(layer.run), *tensors_of(layer.layout)]}  # fmt: skip
    assert layer.is_laid_out and layer.run is layer.layout
    assert bits / 8 < sum(held.values()) / 2048**2 <= BYTES[bits]


@every_layer
def test_what_is_read_saved_and_moved_are_the_words(twins):
    there, here = twins
    assert here.is_laid_out and here.run.name in ("wna16 kernel", "w8a8 kernel")
    assert_same(words(here), words(there))
    assert all(torch.equal(a, b) for a, b in zip(here.integers(), there.integers(), strict=True))
    assert torch.equal(here.dequantize(), there.dequantize()) and num_weights(here) == num_weights(there)
    file = io.BytesIO()
    torch.save(here, file)
    file.seek(0)
    for twin in (copy.deepcopy(here), pickle.loads(pickle.dumps(here)), torch.load(file, weights_only=False)):
        assert twin.is_laid_out and twin.layout is not here.layout
        assert_same(words(twin), words(there))
    assert_same(words(copy.deepcopy(here).double().float()), words(there))
    half, other = (copy.deepcopy(one).to(torch.bfloat16) for one in twins)
    assert half.run.name.startswith("w8a8") or half.run.dtype is torch.bfloat16
    assert torch.equal(half.dequantize(), other.dequantize())
    assert torch.equal(here.unpacked().weight, there.unpacked().weight)


@every_layer
def test_the_product_follows_what_is_stored(twins, monkeypatch):
    _, here = twins
    x, scheme = torch.randn(5, K), here.scheme

    def check():
        oracle = here.rounded(x).double() @ here.dequantize(torch.float64).t() + here.bias.double()
        with torch.no_grad():
            y = here(x)
        assert (y.double() - oracle).norm() / oracle.norm() < 2e-6

    check()
    here.scales.mul_(1.5)  # in place
    check()
    other = packed_layer(scheme, seed=1)
    here.load_state_dict(other.state_dict())
    check()
    assert here.is_laid_out and torch.equal(here.dequantize(), other.dequantize())
    here.qweight = packed_layer(scheme, seed=2).words()  # replaced
    check()
    assert here.is_laid_out
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), pytest.MonkeyPatch.context() as once:
        once.setattr(type(here.run), "integers", None)  # a float32 model is multiplied by the kernel all the same
        y = here(x)
    oracle = here.rounded(x.bfloat16()).double() @ here.dequantize(torch.float64).t() + here.bias.double()
    assert y.dtype is torch.bfloat16 and (y.double() - oracle).norm() / oracle.norm() < 8e-3
    inputs = x.clone().requires_grad_()
    here(inputs).square().sum().backward()
    y = here(x)
    torch.testing.assert_close(inputs.grad, 2 * y @ here.dequantize(), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(gpu, "takes", lambda device: False)  # as after `.to("cpu")`
    here.prepare()
    assert here.qweight.numel() and here.layout is None
    check()


@every_layer
@torch.no_grad()
def test_a_layer_compiles_whole(twins):
    _, here = twins
    for layer in (here, copy.deepcopy(here).to(torch.bfloat16)):
        torch.compiler.reset()
        x = torch.randn(5, K, dtype=layer.compute_dtype)
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-2, atol=1e-1 if y.dtype is torch.bfloat16 else 1e-3)


def test_groups_that_no_kernel_walks_keep_their_words(on_gpu):
    layer = packed_layer(SCHEMES["4-bit-act-order"])
    layer.g_idx = layer.g_idx.clone().fill_(0)  # all of one group: no kernel, and no words to lose
    expected = layer.dequantize()
    with torch.no_grad():
        y = layer(torch.eye(K))
    assert layer.qweight.numel() and layer.run.name == "float32 per call"
    torch.testing.assert_close(y - layer.bias, expected.t(), rtol=1e-5, atol=1e-5)


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model)).logits


@pytest.fixture
def packed_llama():
    return hfc.quantize(tiny_model("llama"), 4, embedding_bits=8).eval()


def test_a_model_walks_its_whole_way(packed_llama, tmp_path, monkeypatch):
    expected, plain, count = logits(packed_llama), packed_llama.dequantize(), num_parameters(packed_llama)
    monkeypatch.setattr(gpu, "takes", lambda device: True)
    model = hfc.quantize(plain, 4, embedding_bits=8).eval()
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert layers and all(layer.is_laid_out for layer in layers) and num_parameters(model) == count
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert all(module.is_laid_out for module in again.modules() if isinstance(module, PackedLinear))
    assert torch.equal(logits(again), logits(model))
    hfc.export(again, tmp_path / "plain", format="plain")
    monkeypatch.setattr(gpu, "takes", lambda device: False)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    torch.testing.assert_close(logits(opened), expected)


def test_blocks_are_stored_as_blocks(on_gpu):
    q = torch.full((64, 64), 8, dtype=torch.uint8)
    q[:16, :16] = torch.randint(0, 16, (16, 16), dtype=torch.uint8)
    layer = PackedLinear(64, 64, WeightScheme(4, symmetric=True), bias=False)
    layer.fill(q, torch.full((1, 64), 0.5), torch.full((1, 64), 8, dtype=torch.uint8))
    blocks = PackedBlocksLinear.of(layer, 16)
    assert blocks.is_laid_out and blocks.num_blocks == 1 and torch.equal(blocks.integers()[0], q)
    stored = words(blocks)
    assert "qblocks" in stored and "qweight" not in stored
    for twin in (copy.deepcopy(blocks), blocks):
        twin.load_state_dict(stored)
        with torch.no_grad():
            twin(torch.ones(1, 64))
        assert twin.is_laid_out and torch.equal(twin.integers()[0], q)
        assert_same(words(twin), stored)


def test_scales_are_trained_over_a_layout(on_gpu, tmp_path):
    from hf_compress.layers.trained_scales import train_scales

    model = hfc.quantize(tiny_model("llama"), 4)
    before = {name: module.integers()[0] for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    forms = train_scales(model)
    for form in forms.values():
        form.t.data.fill_(0.25)
    name, form = next(iter(forms.items()))
    trained = model.get_submodule(name)
    scales = trained.state_dict()["scales"]
    form.take_off(trained)
    form.stored(trained)
    assert torch.equal(trained.integers()[0], before[name]) and torch.equal(trained.scales, scales)
    assert trained.is_laid_out


def test_adapters_train_over_a_layout(on_gpu, tmp_path):
    """PEFT asks `qweight` where an adapter belongs."""
    peft = pytest.importorskip("peft")
    model = hfc.quantize(tiny_model("llama"), 4)
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    batch = tiny_batch(model)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert torch.equal(logits(adapted), before)
    assert any(p.grad is not None and p.grad.abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n)
    adapted.save_pretrained(tmp_path / "adapter")
    packed = [module for module in adapted.modules() if isinstance(module, PackedLinear)]
    assert packed and all(layer.is_laid_out for layer in packed)
