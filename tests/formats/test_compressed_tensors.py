"""compressed-tensors checkpoints of others: written here by hand from the format, and by the library itself."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.commands.convert import run
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear
from tests.helpers import tiny_batch, tiny_model

NAME = "model.layers.1.mlp.down_proj"


def words_of(row, bits):
    """Signed integers as int32 words: the row as one long number, the first value lowest, cut every 32 bits."""
    stream = sum((int(q) + 2 ** (bits - 1)) << (i * bits) for i, q in enumerate(row))
    words = [(stream >> (32 * w)) % 2**32 for w in range(-(-len(row) * bits // 32))]
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)


def packed(q, bits):
    return torch.stack([words_of(row, bits) for row in q.tolist()])


def write(model, folder, groups, *, g_idx=False, scale_dtype=torch.float16, **settings):
    """Save `model` with random integers in the modules of `groups`, {module names: group}. Returns their weights."""
    generator, state, weights = torch.Generator().manual_seed(0), model.state_dict(), {}
    for names, group in groups.items():
        args = group["weights"]
        bits, strategy = args["num_bits"], args["strategy"]
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        for name in names:
            N, K = state.pop(f"{name}.weight").shape
            G = K // args["group_size"] if strategy == "group" else 1
            shape = (1,) if strategy == "tensor" else (N, G)
            q = torch.randint(low, high, (N, K), generator=generator)
            scale = (torch.rand(shape, generator=generator) / 50 + 0.01).to(scale_dtype)
            zero = torch.zeros(shape, dtype=torch.int8)
            if not args["symmetric"]:
                zero = torch.randint(low, high, shape, generator=generator).to(torch.int8)
                state[f"{name}.weight_zero_point"] = packed(zero.t(), bits).t() if len(shape) == 2 else zero
            order = torch.arange(K) // (K // G)
            if g_idx:
                order = order[torch.randperm(K, generator=generator)]
                state[f"{name}.weight_g_idx"] = order.int()
            if group.get("format", "pack-quantized") == "pack-quantized":
                state[f"{name}.weight_packed"], state[f"{name}.weight_shape"] = packed(q, bits), torch.tensor([N, K])
            else:
                state[f"{name}.weight"] = q.to(torch.int8)
                if not args["symmetric"]:
                    state[f"{name}.weight_zero_point"] = zero
            state[f"{name}.weight_scale"] = scale
            scale, zero = (t.expand(N, G)[:, order].float() for t in (scale, zero))
            weights[name] = scale * (q - zero)
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())}, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}, **settings,
    }  # fmt: skip
    model.config.save_pretrained(folder)
    return weights


def group(bits, *, symmetric=True, group_size=None, strategy=None, targets=("Linear",), **others):
    strategy = strategy or ("channel" if group_size is None else "group")
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group_size,
               "dynamic": False, "actorder": None, "block_structure": None}  # fmt: skip
    return {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None,
            **others}  # fmt: skip


def linear_names(model):
    return tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers.1." in n)


def check(folder, weights):
    """The checkpoint opens with these weights and runs like a dense model that has them. Returns the model."""
    loaded = hfc.load_compressed_tensors(folder)
    dense = tiny_model("llama")
    for name, weight in weights.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), weight), name
        dense.get_submodule(name).weight.data = weight
    batch = tiny_batch(dense)
    torch.testing.assert_close(loaded(**batch).logits, dense(**batch).logits)
    return loaded


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)
@pytest.mark.parametrize("options", [dict(), dict(symmetric=False), dict(symmetric=False, group_size=8)],
                         ids=["rows", "asymmetric-rows", "asymmetric-groups"])  # fmt: skip
def test_packed_weights_are_read_as_the_format_says(bits, options, tmp_path):
    model = tiny_model("llama")
    weights = write(model, tmp_path, {linear_names(model): group(bits, **options)})
    loaded = check(tmp_path, weights)
    scheme = loaded.get_submodule(NAME).scheme
    assert (scheme.bits, scheme.symmetric) == (bits, options.get("symmetric", True))
    loaded.save_pretrained(tmp_path / "own")
    again, batch = type(model).from_pretrained(tmp_path / "own"), tiny_batch(model)
    assert torch.equal(again(**batch).logits, loaded(**batch).logits)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_one_scale_for_a_tensor(symmetric, tmp_path):
    model = tiny_model("llama")
    layout = group(4, symmetric=symmetric, strategy="tensor")
    check(tmp_path, write(model, tmp_path, {linear_names(model): layout}, scale_dtype=torch.bfloat16))


def test_columns_out_of_order(tmp_path):
    model = tiny_model("llama")
    weights = write(model, tmp_path, {linear_names(model): group(3, symmetric=False, group_size=16)}, g_idx=True)
    assert check(tmp_path, weights).get_submodule(NAME).scheme.desc_act


def test_groups_are_found_by_name_before_pattern_before_class(tmp_path):
    model = tiny_model("llama")
    attention = tuple(n for n in linear_names(model) if "self_attn" in n)
    others = tuple(n for n in linear_names(model) if "mlp" in n and n != NAME)
    weights = write(model, tmp_path, {
        others: group(2, group_size=8, format="pack-quantized"),
        attention: group(4, targets=["re:.*self_attn.*"], format="pack-quantized"),
        (NAME,): group(8, targets=[NAME], format="int-quantized"),
    }, format="mixed-precision")  # fmt: skip
    loaded = check(tmp_path, weights)
    assert {loaded.get_submodule(names[0]).scheme.bits for names in (others, attention, (NAME,))} == {2, 4, 8}


def test_tables_are_read(tmp_path):
    model = tiny_model("llama")
    weights = write(model, tmp_path, {("model.embed_tokens",): group(4, symmetric=False, targets=["Embedding"])})
    assert isinstance(check(tmp_path, weights).model.embed_tokens, PackedEmbedding)


def test_convert_writes_them_for_other_readers(tmp_path, capsys):
    model = tiny_model("llama", intermediate_size=64, head_dim=16)
    weights = write(model, tmp_path / "theirs", {linear_names(model): group(4, group_size=16)})
    assert run("convert", [str(tmp_path / "theirs"), str(tmp_path / "ours"), "--format", "gptq"]) == 0
    loaded = hfc.load_gptq(tmp_path / "ours")
    assert all(torch.equal(loaded.get_submodule(name).dequantize(), weight) for name, weight in weights.items())


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(("inputs", "limits"), [(TOKEN, None), (TENSOR, (-1.0, 1.55))], ids=["token", "calibrated"])
def test_eight_bit_inputs_are_read(inputs, limits, tmp_path):
    model = tiny_model("llama")
    names = linear_names(model)
    weights = write(model, tmp_path, {names: group(8, format="int-quantized", input_activations=inputs)})
    if limits is not None:
        state = load_file(tmp_path / "model.safetensors")
        for name in names:
            state |= {
                f"{name}.input_scale": torch.tensor([0.01]),
                f"{name}.input_zero_point": torch.tensor([-28]).char(),
            }
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = hfc.load_compressed_tensors(tmp_path)
    layer = loaded.get_submodule(NAME)
    assert torch.equal(layer.dequantize(), weights[NAME]) and layer.scheme.activation_bits == 8
    assert layer.scheme.activation_range == (None if limits is None else pytest.approx(limits))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
    if limits is None:
        scale, zero = x.abs().amax(1, keepdim=True) / 127, 0
    else:
        scale, zero = 0.01, -28
    rounded = ((x / scale + zero).round().clamp(-128, 127) - zero) * scale
    torch.testing.assert_close(layer(x), rounded @ weights[NAME].t(), rtol=1e-4, atol=1e-4)


def damage(key, value):
    def change(state, settings):
        state[f"{NAME}.{key}"] = value(state[f"{NAME}.{key}"])

    return change


def setting(key, value):
    def change(state, settings):
        target = (
            settings["config_groups"]["group_0"] if key in ("output_activations", "input_activations") else settings
        )
        target.update({key: value})

    return change


def weight_setting(**values):
    return lambda state, settings: settings["config_groups"]["group_0"]["weights"].update(values)


BROKEN = {
    "format": (setting("format", "float-quantized"), r"mlp.*'float-quantized'"),
    "float": (weight_setting(type="float"), "mlp.*'float' weights"),
    "bits": (weight_setting(num_bits=5), "mlp.*bits must be one of"),
    "strategy": (weight_setting(strategy="block"), "mlp.*strategy 'block'"),
    "groups": (weight_setting(group_size=5), "mlp.*group_size must divide the 48"),
    "other-groups": (weight_setting(group_size=16), r"mlp.*weight_scale must be \(32, 3\)"),
    "other-bits": (weight_setting(num_bits=8), "mlp.*8 bits of a weight"),
    "no-target": (lambda _, s: s["config_groups"]["group_0"].update(targets=["Conv2d"]), "mlp.*none of the targets"),
    "outputs": (setting("output_activations", TOKEN), "mlp.*output_activations"),
    "inputs": (setting("input_activations", {**TOKEN, "num_bits": 4}), "mlp.*inputs of 4 bits"),
    "cache": (setting("kv_cache_scheme", TOKEN), "kv_cache_scheme"),
    "rotation": (setting("transform_config", {"config_groups": {"R1": {}}}), "transform_config"),
    "method": (setting("quant_method", "gptq"), "quantized by 'gptq'"),
    "words": (damage("weight_packed", lambda t: t[:, :-1]), "mlp.*without gaps"),
    "rows": (damage("weight_shape", lambda t: t + 1), "mlp.*without gaps"),
    "scales": (damage("weight_scale", lambda t: t * torch.nan), "mlp.*NaN"),
    "scales-in-another-box": (
        damage("weight_scale", lambda t: t[None]),
        r"mlp.*weight_scale must be .*got \(1, 32, 6\)",
    ),
    "scales-turned": (damage("weight_scale", lambda t: t.t()), r"mlp.*weight_scale must be .*got \(6, 32\)"),
    "order-in-another-box": (damage("weight_g_idx", lambda t: t[None] * 0 - 1), "mlp.*weight_g_idx must hold 48"),
    "zero-points": (damage("weight_zero_point", lambda t: t[1:]), "mlp.*weight_zero_point must be"),
    "order": (damage("weight_g_idx", lambda t: t + 1), "mlp.*weight_g_idx must hold 48"),
    "unknown": (lambda s, _: s.update({f"{NAME}.weight_global_scale": torch.ones(1)}), "mlp.*weight_global_scale"),
    "module": (lambda s, _: s.update({"model.norm.weight_scale": torch.ones(1)}), "model.norm.*LlamaRMSNorm"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_read_and_what_is_damaged_is_named(change, message, tmp_path):
    model = tiny_model("llama")
    write(model, tmp_path, {(NAME,): group(4, symmetric=False, group_size=8)}, g_idx=True)
    state = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    change(state, config["quantization_config"])
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        hfc.load_compressed_tensors(tmp_path)


@pytest.fixture
def library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("compressed_tensors")


def compress(model, folder, scheme, scale_dtype):
    """Quantize and save `model` with the library's own functions. Returns the weights that it reads itself."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config, show_progress=False)
    quantized = {n: m for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    for module in quantized.values():
        args = module.quantization_scheme.weights
        size = {"group": args.group_size, "channel": -1}.get(args.strategy)
        rows = module.weight.flatten()[None] if size is None else module.weight
        rows = rows.detach().unflatten(1, (-1, rows.shape[1] if size in (None, -1) else size))
        scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
        module.weight_scale.data = scale.to(scale_dtype).view(module.weight_scale.shape)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.view(module.weight_scale.shape)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    for module in quantized.values():
        decompress_module(module)
    return {name: module.weight for name, module in quantized.items()}


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", [
    dict(num_bits=2, symmetric=False, strategy="group", group_size=16),
    dict(num_bits=3, symmetric=True, strategy="group", group_size=8),
    dict(num_bits=4, symmetric=False, strategy="channel"),
    dict(num_bits=4, symmetric=True, strategy="tensor", actorder="weight"),
    dict(num_bits=8, symmetric=False, strategy="group", group_size=16),
    dict(num_bits=8, symmetric=True, strategy="channel"),
], ids=["2", "3-symmetric", "4-rows", "4-tensor", "8", "8-inputs"])  # fmt: skip
def test_what_the_library_writes_is_read_bit_for_bit(preset, scale_dtype, tmp_path, library):
    inputs = TOKEN if preset["num_bits"] == 8 and preset["symmetric"] else None
    scheme = {"targets": ["Linear"], "weights": preset, "input_activations": inputs}
    weights = compress(tiny_model("llama"), tmp_path, scheme, scale_dtype)
    loaded = hfc.load_compressed_tensors(tmp_path)
    assert len(weights) == sum(isinstance(m, PackedLinear) for m in loaded.modules()) == 28
    for name, weight in weights.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(weight.dtype), weight), name
    assert loaded.get_submodule(NAME).scheme.activation_bits == (8 if inputs else None)
