"""Rounding that is learned: steps follow the equations, a layer never ends farther off than by rounding to nearest."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import tiny_batch, tiny_model

import hf_compress as hfc
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.model.calibration import capture_stack_inputs
from hf_compress.quantization import signround
from hf_compress.quantization.grids import round_to_nearest
from hf_compress.quantization.signround import Rounding, learn, straight_through
from hf_compress.recipe.one_shot import Samples
from hf_compress.recipe.stages import read_stages

STEPS = dict(method="signround", steps=5, group_size=16, exact_products=True)


def calibration(model, batches=3):
    return [tiny_batch(model, batch=4, length=16, seed=seed) for seed in range(batches)]


def gradients_by_hand(W, X, low, high, V, alpha, beta, bits, symmetric):
    """Of sum (x W~^T - x W^T)^2 for W (N, K) in one group a row, value by value: eq. 3 to 6 with straight rounding."""
    N, K = W.shape
    largest = 2**bits - 1
    found = [torch.zeros_like(t) for t in (V, alpha, beta)]
    for n in range(N):
        lo, hi = beta[n] * low[n], alpha[n] * high[n]
        if symmetric:
            s, z = 2 * max(-lo, hi) / largest, torch.tensor(2.0 ** (bits - 1)).double()
            ds = {
                "alpha": 2 * high[n] / largest if hi > -lo else 0.0,
                "beta": 0.0 if hi > -lo else -2 * low[n] / largest,
            }
            dz = {"alpha": 0.0, "beta": 0.0}
        else:
            s = (hi - lo) / largest
            z = (-lo / s).round()
            ds = {"alpha": high[n] / largest, "beta": -low[n] / largest}
            dz = {"alpha": lo / s**2 * ds["alpha"], "beta": -low[n] / s + lo / s**2 * ds["beta"]}
        s = s.float().double()  # as it is stored
        q = (W[n] / s + z + V[n]).round()
        inside = (q >= 0) & (q <= largest)
        q = q.clamp(0, largest)
        error = X @ (s * (q - z) - W[n])  # (rows,)
        towards = 2 * error @ X  # (K,), of W~
        found[0][n] = towards * s * inside
        for name, grad in (("alpha", found[1]), ("beta", found[2])):
            dq = inside * (-W[n] / s**2 * ds[name] + dz[name])
            grad[n] = (towards * (ds[name] * (q - z) + s * (dq - dz[name]))).sum()
    return found


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_gradients_and_the_signed_step_are_those_of_the_equations(symmetric):
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(5, 8, generator=generator).double(), torch.randn(20, 8, generator=generator).double()
    scheme = WeightScheme(3, -1, symmetric, scale_dtype="float32")
    rounding = Rounding(W, scheme, range_method="mse")
    rounding.V.copy_(torch.rand(5, 1, 8, generator=generator) - 0.5)
    rounding.alpha.copy_(torch.rand(5, 1, 1, generator=generator) / 4 + 0.7)
    rounding.beta.copy_(torch.rand(5, 1, 1, generator=generator) / 4 + 0.7)
    before = [tensor[:, 0].clone() for tensor in rounding.learned]
    expected = gradients_by_hand(
        W, X, rounding.low[:, 0, 0], rounding.high[:, 0, 0], before[0], before[1][:, 0], before[2][:, 0], 3, symmetric
    )
    for tensor in rounding.learned:
        tensor.requires_grad_()
    loss = (X @ (rounding.weight() - W).T).square().sum()
    found = torch.autograd.grad(loss, rounding.learned)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.flatten(), other.flatten(), rtol=1e-6, atol=1e-6)
    for tensor in rounding.learned:
        tensor.requires_grad_(False)
    rounding.step(found, 0.01)
    V = (before[0] - 0.01 * expected[0].sign()).clamp(-0.5, 0.5)
    torch.testing.assert_close(rounding.V[:, 0], V, rtol=1e-6, atol=1e-6)
    alpha = before[1][:, 0] - 0.01 * expected[1].sign()
    torch.testing.assert_close(rounding.alpha.flatten(), alpha, rtol=1e-6, atol=1e-6)


def test_the_first_rounding_is_the_nearest_and_a_range_grows_no_further_than_the_values():
    W = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    for scheme in (WeightScheme(2, 16), WeightScheme(4, -1, True)):
        rounding, nearest = Rounding(W, scheme), round_to_nearest(W, scheme)
        assert torch.equal(rounding.weight(), nearest.dequantize())
        assert torch.equal(rounding.result().q, nearest.q)
        for _ in range(9):
            rounding.step([torch.zeros_like(rounding.V), -torch.ones(6, 1, 1), torch.ones(6, 1, 1)], 0.5)
        groups = W.unflatten(1, (-1, rounding.W.shape[-1]))
        torch.testing.assert_close(rounding.alpha * rounding.high, groups.amax(-1, keepdim=True))
        assert (rounding.beta == 0.5).all()


def test_the_rate_falls_to_none_and_the_best_is_kept(monkeypatch):
    """One weight: 0.4 of a step of the grid, and a target that wants it one step up."""
    scheme = WeightScheme(2, -1, scale_dtype="float32")
    rounding = Rounding(torch.tensor([[0.4, 0.0, 3.0]]), scheme, range_method="minmax", learn_ranges=False)
    rates, step = [], rounding.step
    monkeypatch.setattr(rounding, "step", lambda gradients, rate: (rates.append(rate), step(gradients, rate)))
    target = torch.tensor([[1.0, 0.0, 3.0]])
    errors = learn({"it": rounding}, lambda b, w: w["it"], lambda b: target, 1, steps=4, rate=0.1)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert rounding.result().q.tolist() == [[1, 0, 3]] and errors == (pytest.approx(1 / 3), pytest.approx(0.0))
    errors = learn({"it": rounding}, lambda b, w: w["it"], lambda b: target * (-1) ** b, 2, steps=40, rate=1.0)
    assert errors[1] <= errors[0]


def test_straight_through_is_exact():
    value = torch.tensor([1e-8, 3.4, 200.5], requires_grad=True)
    y = straight_through(value, value.round())
    assert torch.equal(y, value.round()) and torch.autograd.grad(y.sum(), value)[0].tolist() == [1, 1, 1]


@torch.no_grad()
def first_outputs(model, batch):
    """What the first layer puts out for the real tokens, (tokens, D)."""
    seen = []
    layer = hfc.anatomy(model).stacks[0].layers[0].module
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(**batch)
    handle.remove()
    return seen[0][batch["attention_mask"].bool()]


def distance(model, other, batches):
    return sum(float((first_outputs(model, b) - first_outputs(other, b)).square().sum()) for b in batches)


SHALLOW = {"bert": {"num_hidden_layers": 1}, "llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1},
           "t5": {"num_layers": 1, "num_decoder_layers": 1}}  # fmt: skip


@pytest.mark.parametrize("family", SHALLOW)
def test_a_layer_is_nearer_than_by_rounding_to_nearest_and_the_model_is_an_ordinary_packed_one(family, tmp_path):
    original = tiny_model(family, **SHALLOW[family])
    data = calibration(original)
    learned = hfc.quantize(copy.deepcopy(original), 2, calibration=data, **STEPS)
    nearest = hfc.quantize(copy.deepcopy(original), 2, group_size=16)
    assert distance(learned, original, data) < distance(nearest, original, data)
    kinds = {n: type(m) for n, m in nearest.named_modules() if isinstance(m, PackedLinear)}
    assert kinds == {n: type(m) for n, m in learned.named_modules() if isinstance(m, PackedLinear)}
    learned.save_pretrained(tmp_path / "saved")
    opened, batch = type(learned).from_pretrained(tmp_path / "saved").eval(), tiny_batch(learned)
    assert torch.equal(opened(**batch).logits, learned(**batch).logits)
    hfc.export(learned, tmp_path / "plain", format="plain")
    plain = type(original).from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(**batch).logits, learned(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_follows_the_uncompressed_model_on_what_the_quantized_ones_hand_on(monkeypatch):
    """What the second layer is told to follow is what it puts out in the uncompressed model."""
    original, told = tiny_model("llama"), {}

    def see(roundings, outputs, targets, num_batches, *, name, **options):
        told[name] = [targets(batch) for batch in range(num_batches)]
        return learn(roundings, outputs, targets, num_batches, name=name, **options)

    monkeypatch.setattr(signround, "learn", see)
    data = calibration(original)
    hfc.quantize(tiny_model("llama"), 3, calibration=data, **{**STEPS, "steps": 2})
    states = [original(**batch, output_hidden_states=True).hidden_states[2] for batch in data]
    found, expected = (
        torch.cat(told["model.layers.1"]),
        torch.cat([s[b["attention_mask"].bool()] for s, b in zip(states, data, strict=True)]),
    )
    order = [t[t[:, 0].argsort()] for t in (found, expected)]  # batches may come in another order
    torch.testing.assert_close(*order, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_cut_off_goes_on_to_the_same_model(tmp_path, monkeypatch):
    data = calibration(tiny_model("bert"))
    options = dict(calibration=data, **{**STEPS, "steps": 2})
    whole = hfc.quantize(tiny_model("bert"), 3, **options)
    names = []

    def fails_in_the_third_layer(*args, name, **kwargs):
        names.append(name)
        if name.endswith("layer.2") and len(names) == 3:
            raise KeyboardInterrupt
        return learn(*args, name=name, **kwargs)

    monkeypatch.setattr(signround, "learn", fails_in_the_third_layer)
    with pytest.raises(KeyboardInterrupt):
        hfc.quantize(tiny_model("bert"), 3, resume_dir=str(tmp_path), **options)
    resumed = hfc.quantize(tiny_model("bert"), 3, resume_dir=str(tmp_path), **options)
    assert [name.rpartition(".")[2] for name in names] == ["0", "1", "2", "2", "3"]
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in whole.state_dict().items())
    with pytest.raises(ValueError, match="other options"):
        hfc.quantize(tiny_model("bert"), 3, resume_dir=str(tmp_path), **{**options, "steps": 3})
    with pytest.raises(ValueError, match="other options"):
        hfc.quantize(tiny_model("bert"), 3, resume_dir=str(tmp_path), method="gptq", calibration=data, group_size=16)


def test_a_stage_of_a_recipe_learns_on_the_training_rows():
    model = tiny_model("bert", num_hidden_layers=1)
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in torch.arange(5, 55).repeat(4, 1)])
    (stage,) = read_stages([{"quantize": {"method": "signround", "bits": 3, "steps": 2, "learning_rate": "0.1"}}])
    options = stage.options[1]
    assert options.needs_texts and (options.steps, options.learning_rate) == (2, 0.1)
    changed, _ = options.apply(copy.deepcopy(model), None, Samples((), rows, None, 0))
    expected = hfc.quantize(model, 3, method="signround", steps=2, learning_rate=0.1, calibration=rows.shuffle(seed=0))
    assert all(torch.equal(t, changed.state_dict()[name]) for name, t in expected.state_dict().items())


def test_heads_are_learned_by_their_own_outputs():
    model = tiny_model("bert")
    bits = {"bert.pooler.dense": 3, "classifier": 2}
    learned = hfc.quantize(copy.deepcopy(model), bits, calibration=calibration(model), **{**STEPS, "steps": 50})
    nearest = hfc.quantize(copy.deepcopy(model), bits, group_size=16)
    x, W = (
        torch.cat([model.bert(**b).last_hidden_state[:, 0] for b in calibration(model)]),
        model.bert.pooler.dense.weight,
    )
    errors = [(x @ (m.bert.pooler.dense.weight - W).T).square().sum() for m in (learned, nearest)]
    assert errors[0] < errors[1] and learned.classifier.scheme.bits == 2


def test_a_layer_runs_with_other_weights_and_keeps_its_own():
    model = tiny_model("llama")
    (stack,) = hfc.anatomy(model).stacks
    inputs = capture_stack_inputs(model, stack, calibration(model, 1))
    name = "mlp.up_proj.weight"
    before = stack.layers[0].module.get_parameter(name).clone()
    changed = inputs.run(0, {name: torch.zeros_like(before)})
    args, kwargs = inputs.calls[0][0]
    other = copy.deepcopy(stack.layers[0].module)
    torch.nn.init.zeros_(other.get_parameter(name))
    expected = other(inputs.hidden[0], *args, **kwargs)
    assert torch.equal(changed, expected[0] if isinstance(expected, tuple) else expected)
    assert torch.equal(stack.layers[0].module.get_parameter(name), before)


@pytest.mark.parametrize(("options", "message"), [
    (dict(desc_act=True), r"takes no options \['desc_act'\]: it has .*steps"),
    (dict(split_over_ranks=True), "takes no options"),
    (dict(steps=0), "steps must be positive"),
    (dict(learning_rate=0.0), "learning_rate above 0"),
    (dict(offload="gpu"), "offload must be"),
    (dict(range_method="best"), "range_method must be one of"),
    (dict(grid="kmeans"), "grid must be 'uniform'"),
    (dict(calibration=None), "method='signround' needs `calibration`"),
    (dict(calibration=[{"input_ids": [5, 6]}]), "too short: 2 tokens"),
])  # fmt: skip
def test_bad_input_is_refused(options, message):
    model = tiny_model("bert")
    options = {**dict(method="signround", calibration=calibration(model)), **options}
    with pytest.raises(ValueError, match=message):
        hfc.quantize(model, 4, **options)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_nan_names_the_weight_and_the_layer():
    model = tiny_model("bert")
    data = calibration(model)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.key.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer.1.attention.self.key holds NaN"):
        hfc.quantize(model, 4, calibration=data, **{**STEPS, "steps": 1})
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight[0] = torch.inf
    with pytest.raises(ValueError, match="outputs of bert.encoder.layer.1 were NaN or infinite"):
        hfc.quantize(model, 4, calibration=data, **{**STEPS, "steps": 1})
