"""`quantize` on whole models of every family: GPTQ block by block, cut off and resumed, and what it refuses."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.model.calibration import InputMoments, capture_stack_inputs, input_groups
from hf_compress.model.calibration_data import calibration_batches
from hf_compress.quantization import gptq_model
from hf_compress.quantization.gptq_model import matching_weight, shrink
from hf_compress.quantization.modules import scheme_for
from tests.helpers import FAMILIES, tiny_batch, tiny_model


def calibration(model, batches=3):
    return [tiny_batch(model, batch=4, length=16, seed=seed) for seed in range(batches)]


@torch.no_grad()
def distance(model, other, batch):
    return float((model(**batch).logits - other(**batch).logits).norm())


@pytest.mark.parametrize("family", [*FAMILIES, "t5", "longformer", "opt"])
def test_gptq_is_nearer_than_rounding(family):
    original = tiny_model(family)
    batch = tiny_batch(original, batch=4)
    data = calibration(original, batches=8)
    gptq = hfc.quantize(tiny_model(family), 3, method="gptq", calibration=data, exact_products=True)
    rounded = hfc.quantize(tiny_model(family), 3, range_method="minmax")
    assert distance(gptq, original, batch) < distance(rounded, original, batch)
    inside = [n for n, m in gptq.named_modules() if isinstance(m, PackedLinear)]
    assert len(inside) == sum(1 for m in rounded.modules() if isinstance(m, PackedLinear)) > 0


@pytest.mark.parametrize(
    "family",
    ["bert", "llama", "gpt2", "deberta-v2", "bart", "t5", "mt5", "longformer", "opt", "gpt_neo", "bloom", "falcon"],
)
def test_layer_by_layer_states_are_those_of_the_whole_model(family):
    model = tiny_model(family)
    batches = calibration(model, batches=2)
    anatomy = hfc.anatomy(model)
    for stack in anatomy.stacks:
        outputs = []
        handle = stack.layers[-1].module.register_forward_hook(lambda m, a, out, seen=outputs: seen.append(out))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
            handle.remove()
            inputs = capture_stack_inputs(model, stack, batches)
            for _ in stack.layers:
                inputs.advance()
        for number, output in enumerate(outputs):
            output = output[0] if isinstance(output, tuple) else output
            torch.testing.assert_close(inputs.hidden[number], output)


def test_projections_with_one_input_share_a_hessian():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    modules = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    batch = tiny_batch(model)
    groups, counts = input_groups(modules, lambda: model(**batch))
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"desc_act": True, "static_groups": True}], ids=str)
def test_weights_with_one_input_are_quantized_as_one_and_come_out_as_alone(options, monkeypatch):
    """Rows are independent: one factorization serves query, key and value, unless their bits differ."""
    model, quantize_weight, seen = tiny_model("llama"), gptq_model.quantize_weight, []
    projections = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    alone, data = {}, calibration(model)

    def note(W, H, bits, *, name, **more):
        seen.append(name)
        parts = W.split([model.get_submodule(one).out_features for one in name.split(", ")])
        for one, part in zip(name.split(", "), parts, strict=True):
            alone[one] = quantize_weight(part, H, bits, name=one, **more)
        return quantize_weight(W, H, bits, name=name, **more)

    monkeypatch.setattr(gptq_model, "quantize_weight", note)
    mixed = {name: 2 if name.endswith("k_proj") else 4 for name in projections}
    for bits, calls in ((4, 4), (mixed, 5)):
        seen.clear()
        packed = hfc.quantize(copy.deepcopy(model), bits, method="gptq", group_size=16, calibration=data, **options)
        assert len(seen) == calls * model.config.num_hidden_layers
        for name in projections:
            layer = packed.get_submodule(name)
            torch.testing.assert_close(layer.dequantize(), alone[name].dequantize(), rtol=1e-3, atol=1e-6)


def test_moments_are_those_of_all_samples_at_once():
    moments = InputMoments()
    x, exact = torch.randn(50, 6), torch.randn(50, 6)
    for part in range(0, 50, 20):
        moments.add(x[part : part + 20], exact[part : part + 20])
    torch.testing.assert_close(moments.hessian(), 2 * x.T @ x / 50)
    torch.testing.assert_close(moments.cross_hessian(), 2 * exact.T @ x / 50)


def test_padding_does_not_reach_the_hessian():
    model = tiny_model("bert")
    batch = tiny_batch(model, batch=4, length=16)
    changed = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 17)}
    options = dict(method="gptq", exact_products=True, group_size=16)
    one = hfc.quantize(tiny_model("bert"), 4, calibration=[batch] * 2, **options)
    two = hfc.quantize(tiny_model("bert"), 4, calibration=[changed] * 2, **options)
    probe = tiny_batch(model, padding=False)
    torch.testing.assert_close(one(**probe).logits, two(**probe).logits)


def test_matching_weight_solves_its_least_squares():
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(3, 5, generator=generator), torch.randn(5, 40, generator=generator)
    exact = X + 0.3 * torch.randn(5, 40, generator=generator)
    V = matching_weight(W, 2 * X @ X.T, 2 * exact @ X.T, damp_percent=1e-9)
    torch.testing.assert_close(V, torch.linalg.lstsq(X.T, (W @ exact).T).solution.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(matching_weight(W, 2 * X @ X.T, 2 * X @ X.T, damp_percent=0.01), W)


def test_shrinking_leaves_the_diagonal_and_draws_the_rest_to_zero():
    H = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert shrink(H, H, 0.25).tolist() == [[2.0, 0.75], [0.75, 4.0]]
    cross = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    assert shrink(cross, H, 0.5).tolist() == [[1.5, 0.5], [0.0, 3.0]]


def test_matching_the_exact_model_beats_ignoring_it():
    original = tiny_model("llama", num_hidden_layers=6)
    data, batch = calibration(original, 12), tiny_batch(original, batch=4, seed=5)
    options = dict(method="gptq", calibration=data, exact_products=True, group_size=16)
    matched = hfc.quantize(tiny_model("llama", num_hidden_layers=6), 2, match_exact=1.0, **options)
    plain = hfc.quantize(tiny_model("llama", num_hidden_layers=6), 2, match_exact=0.0, **options)
    assert distance(matched, original, batch) < distance(plain, original, batch)


def test_a_run_that_is_cut_off_goes_on_to_the_same_model(tmp_path, monkeypatch):
    data = calibration(tiny_model("bert"))
    options = dict(method="gptq", calibration=data, resume_dir=str(tmp_path))
    whole = hfc.quantize(tiny_model("bert"), 4, method="gptq", calibration=data)
    quantize_weight, calls = gptq_model.quantize_weight, []

    def fails_in_the_third_layer(*args, **kwargs):
        calls.append(kwargs["name"])
        if ".layer.2." in kwargs["name"]:
            raise KeyboardInterrupt
        return quantize_weight(*args, **kwargs)

    monkeypatch.setattr(gptq_model, "quantize_weight", fails_in_the_third_layer)
    with pytest.raises(KeyboardInterrupt):
        hfc.quantize(tiny_model("bert"), 4, **options)
    calls.clear()

    def counts(*args, **kwargs):
        calls.append(kwargs["name"])
        return quantize_weight(*args, **kwargs)

    monkeypatch.setattr(gptq_model, "quantize_weight", counts)
    resumed = hfc.quantize(tiny_model("bert"), 4, **options)
    assert not any(".layer.0." in name or ".layer.1." in name for name in calls) and len(calls) == 8
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="other schemes"):
        hfc.quantize(tiny_model("bert"), 3, **options)


def test_states_on_disk_give_the_same_model():
    data = calibration(tiny_model("llama"))
    memory = hfc.quantize(tiny_model("llama"), 4, method="gptq", calibration=data)
    disk = hfc.quantize(tiny_model("llama"), 4, method="gptq", calibration=data, offload="disk")
    assert all(torch.equal(a, b) for a, b in zip(memory.state_dict().values(), disk.state_dict().values(), strict=True))


def on_disk(folder, *, embeddings="cpu"):
    """The model with two of its four layers on disk."""
    tiny_model("llama").save_pretrained(folder / "plain")
    places = {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    places |= {"model.embed_tokens": embeddings, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder / "plain", device_map=places, offload_folder=folder / "offload")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_on_disk_give_the_same_model_one_at_a_time(method, tmp_path):
    data = calibration(tiny_model("llama"))
    options = dict(method=method) if method == "rtn" else dict(method=method, calibration=data)
    memory = hfc.quantize(tiny_model("llama"), 4, **options)
    model = on_disk(tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    if method == "gptq":
        options["resume_dir"] = str(tmp_path / "resume")
    disk = hfc.quantize(model, 4, **options)
    assert all(torch.equal(tensor, disk.state_dict()[name]) for name, tensor in memory.state_dict().items())
    batch = tiny_batch(memory)
    assert torch.equal(disk(**batch).logits, memory(**batch).logits)
    disk.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(loaded(**batch).logits, memory(**batch).logits)


def test_embeddings_on_disk_are_named(tmp_path):
    data = calibration(tiny_model("llama"))
    with pytest.raises(ValueError, match="model.embed_tokens is on disk"):
        hfc.quantize(on_disk(tmp_path, embeddings="disk"), 4, method="gptq", calibration=data)


def test_heads_are_quantized_with_what_reaches_them():
    model = tiny_model("bert")
    bits = {"bert.pooler.dense": 4, "classifier": 8, "bert.encoder.layer.3.output.dense": 2}
    hfc.quantize(model, bits, method="gptq",
                 calibration=calibration(model, 16))  # fmt: skip
    assert isinstance(model.classifier, PackedLinear) and model.bert.pooler.dense.scheme.bits == 4
    assert not isinstance(model.bert.encoder.layer[0].output.dense, PackedLinear)


def test_static_groups_store_no_order_and_act_order_does():
    data = calibration(tiny_model("bert"))
    for options, stored in (({"static_groups": True}, False), ({}, True)):
        model = hfc.quantize(
            tiny_model("bert"), 4, method="gptq", calibration=data, desc_act=True, group_size=16, **options
        )
        layer = model.bert.encoder.layer[0].output.dense
        assert (layer.g_idx is not None) == stored == layer.scheme.desc_act


def test_rows_are_padded_and_labels_left_out():
    model = tiny_model("bert")
    (batch,) = calibration_batches([{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8]}], model)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=5), "encoder.layer.0.*bits must be one of"),
        (dict(bits={"bert.pooler.dense": 4, "classifier": 16}), "classifier: bits must be one of"),
        (dict(bits=4, group_size=7), "encoder.layer.0.*group_size must divide"),
        (dict(bits={"bert.nowhere": 4}), "no module called"),
        (dict(bits={"bert.encoder.layer.0.output.LayerNorm": 4}), "only nn.Linear"),
        (dict(bits=4, method="awq"), "method must be one of"),
        (dict(bits=4, method="gptq"), "needs `calibration`"),
        (dict(bits=4, method="gptq", calibration=[]), "calibration is empty"),
        (dict(bits=4, method="gptq", calibration=[{"input_ids": []}]), "without tokens"),
        (
            dict(bits=4, method="gptq", calibration=[{"input_ids": [5, 6]}]),
            "too short: 2 tokens.*48 columns of bert.encoder",
        ),
        (dict(bits=4, method="gptq", calibration=[{"input_ids": [500] * 99}]), "token 500.*own tokenizer"),
        (dict(bits=4, method="gptq", calibration=[{"text": "hello"}]), "must hold `input_ids`"),
        (dict(bits=4, skip_modules=["no.such"]), "skip_modules"),
        (dict(bits=4, desc_act=True), "takes no options"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hfc.quantize(tiny_model("bert"), **options)


def test_nan_names_the_layer():
    model = tiny_model("bert")
    data = calibration(model)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.key.weight[0, 0] = torch.nan
    for options in ({}, dict(method="gptq", calibration=data)):
        with pytest.raises(ValueError, match="encoder.layer.1.attention.self.key"):
            hfc.quantize(copy.deepcopy(model), 4, **options)
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight[0] = torch.inf
    with pytest.raises(ValueError, match="encoder.layer.2.attention.self.query.*calibration"):
        hfc.quantize(model, 4, method="gptq", calibration=data)


def test_inputs_that_are_always_zero_leave_a_named_singular_hessian():
    model = tiny_model("bert")
    torch.nn.init.zeros_(model.bert.encoder.layer[0].output.LayerNorm.weight)
    with pytest.raises(ValueError, match="layer.1.attention.self.query, .*calibration samples.* stays singular"):
        hfc.quantize(model, 4, method="gptq", calibration=calibration(model))


def test_a_quantized_model_is_not_quantized_again():
    model = hfc.quantize(tiny_model("bert"), 4)
    with pytest.raises(ValueError, match="quantized already"):
        hfc.quantize(model, 4)


@torch.no_grad()
def every_input(model, name, batches):
    """All rows that the module ever gets, real tokens and positions, by a hook on the whole model."""
    rows = []
    for batch in batches:
        mask = batch["attention_mask"].bool()

        def see(module, args, mask=mask):
            x = args[0]
            rows.append(x[mask] if x.shape[:2] == mask.shape else x.flatten(0, -2))

        handle = model.get_submodule(name).register_forward_pre_hook(see)
        model(**batch)
        handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["query_proj", "key_proj", "value_proj"])
def test_a_projection_that_is_called_twice_is_fitted_to_both_inputs(name, monkeypatch):
    """DeBERTa with `share_att_key` projects tokens and relative positions by the same weights."""
    model, hessians = tiny_model("deberta-v2", share_att_key=True), {}
    module = f"deberta.encoder.layer.0.attention.self.{name}"
    batches = calibration_batches(calibration(model), model)
    X = every_input(model, module, batches)
    positions = 0 if name == "value_proj" else len(batches) * 2 * model.config.position_buckets
    assert len(X) == sum(int(batch["attention_mask"].sum()) for batch in batches) + positions
    quantize_weight = gptq_model.quantize_weight

    def note(weight, hessian, *args, **kwargs):
        hessians.update(dict.fromkeys(kwargs["name"].split(", "), hessian))
        return quantize_weight(weight, hessian, *args, **kwargs)

    monkeypatch.setattr(gptq_model, "quantize_weight", note)
    hfc.quantize(model, 4, method="gptq", calibration=batches, exact_products=True, match_exact=0, shrinkage=0)
    torch.testing.assert_close(hessians[module], 2 * X.T @ X / len(X))


@pytest.mark.parametrize("part", ["encoder.layer.1.output.dense.weight", "embeddings.LayerNorm.bias"])
def test_finished_layers_of_another_model_are_refused(part, tmp_path):
    """Of the same energy, or with other weights than those that are packed alone."""
    options = dict(method="gptq", calibration=calibration(tiny_model("bert")), resume_dir=str(tmp_path))
    hfc.quantize(tiny_model("bert"), 4, **options)
    other = tiny_model("bert")
    with torch.no_grad():
        tensor = other.bert.get_parameter(part)
        tensor.copy_(-tensor if tensor.ndim > 1 else tensor + 1)
    with pytest.raises(ValueError, match="run with other weights"):
        hfc.quantize(other, 4, **options)


@pytest.mark.parametrize("asked, columns, size", [
    ("auto", 128, 128), ("auto", 96, 32), ("auto-64", 128, 64), ("auto-64", 96, 32), ("auto-32", 128, 32),
    ("auto-32", 40, -1),
])  # fmt: skip
def test_groups_that_fit_up_to_a_size(asked, columns, size):
    assert scheme_for(torch.nn.Linear(columns, 4), "it", 3, group_size=asked).group_size == size
