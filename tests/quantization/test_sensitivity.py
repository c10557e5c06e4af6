"""Sensitivities against the exact Hessian of a tiny model, in float64."""

import copy

import pytest
import torch
from transformers import AutoModel

from hf_compress import allocate_bits, quantize
from hf_compress.quantization import sensitivity
from hf_compress.quantization.sensitivity import hessian_sensitivity, top_eigenvalue
from tests.helpers import tiny_batch, tiny_model


def model_and_batches(batches=2):
    model = tiny_model("bert", attn="eager", hidden_size=8, num_attention_heads=2, intermediate_size=8,
                       num_hidden_layers=2).double()  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 4  # away from the flat start, so that the Hessian is worth the name
    data = []
    for seed in range(batches):
        batch = tiny_batch(model, batch=4, length=10, seed=seed)
        data.append(batch | {"labels": torch.tensor([0, 1, 1, 0])})
    return model, data


def exact_hessian(model, batches, weight):
    """Row by row, by double backward."""
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    rows = [torch.autograd.grad(g, weight, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    return torch.stack(rows)


NAMES = ["bert.encoder.layer.0.attention.self.value", "bert.encoder.layer.1.output.dense"]


def test_eigenvalues_are_within_one_percent_of_the_exact_ones():
    model, batches = model_and_batches()
    found = hessian_sensitivity(model, batches, modules=NAMES, parts=2, tolerance=1e-5)
    for name in NAMES:
        tops = []
        for batch in batches:
            values = torch.linalg.eigvalsh(exact_hessian(model, [batch], model.get_submodule(name).weight))
            tops.append(values[values.abs().argmax()])
        tops = torch.stack(tops)
        assert found[name] == pytest.approx(float(tops.mean().abs() + tops.std(correction=0)), rel=0.01)


def test_trace_is_the_mean_diagonal():
    model, batches = model_and_batches()
    found = hessian_sensitivity(model, batches, method="trace", modules=NAMES, probes=150)
    for name in NAMES:
        H = exact_hessian(model, batches, model.get_submodule(name).weight)
        spread = 3 * float((2 * (H.square().sum() - H.diagonal().square().sum())).sqrt()) / len(H) / 150**0.5
        assert found[name] == pytest.approx(float(H.diagonal().mean()), abs=2 * spread)


def test_fisher_information_is_the_mean_square_of_gradients():
    model, batches = model_and_batches()
    found = hessian_sensitivity(model, batches, method="fisher", modules=NAMES)
    for name in NAMES:
        weight, squares = model.get_submodule(name).weight, []
        for batch in batches:
            for i in range(4):
                loss = model(**{key: value[i : i + 1] for key, value in batch.items()}).loss
                squares.append(torch.autograd.grad(loss, weight)[0].square().mean())
        assert found[name] == pytest.approx(float(torch.stack(squares).mean()), rel=1e-9)
        assert hessian_sensitivity(model, batches[:1], method="fisher", modules=[name])[name] != found[name]


PREDICTIONS = {  # what a divergence is taken of: family, task, problem
    "one label": ("bert", "classification", None),
    "several labels": ("bert", "classification", "multi_label_classification"),
    "regression": ("bert", "classification", "regression"),
    "tokens": ("bert", "tokens", None),
    "spans": ("bert", "answers", None),
    "masked": ("bert", "mlm", None),
    "causal": ("llama", "clm", None),
    "sequences": ("bart", "seq2seq", None),
    "vectors": ("bert", None, None),
}


def divergence(found, exact, problem):
    """One number an item (C,), from the definitions."""
    if problem == "multi_label_classification":
        p, q = exact.sigmoid(), found.sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    if problem is not None:
        return (found - exact).square().mean()
    p, q = exact.softmax(-1), found.softmax(-1)
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_divergence_is_the_distance_to_the_model_with_one_weight_rounded(kind):
    family, task, problem = PREDICTIONS[kind]
    if kind == "vectors":
        torch.manual_seed(0)
        model = AutoModel.from_config(tiny_model("bert").config).eval().double()
    else:
        model = tiny_model(family, task, num_labels=3 if task in ("classification", "tokens") else 2).double()
    model.config.problem_type = problem
    for parameter in model.parameters():
        parameter.data *= 2
    batches = [tiny_batch(model, seed=1), tiny_batch(model, seed=2, padding=False)]
    name = [name for name, module in model.named_modules() if name.endswith(("output.dense", "down_proj", "fc2"))][-1]
    found = hessian_sensitivity(model, batches, method="divergence", modules=[name])

    rough = copy.deepcopy(model)
    weight = rough.get_submodule(name).weight
    rounded = quantize(copy.deepcopy(model).float(), {name: 2}, method="rtn").get_submodule(name).dequantize()
    weight.data = rounded.detach().double()
    error = float((weight - model.get_submodule(name).weight).square().sum())
    distances = []
    with torch.no_grad():
        for batch in batches:
            mine, theirs = rough(**batch), model(**batch)
            counted = batch["attention_mask"].bool() if "attention_mask" in batch else None
            for row in range(len(batch["input_ids"])):
                real = counted[row]
                if kind == "spans":
                    distances += [divergence(mine[side][row][real], theirs[side][row][real], problem)
                                  for side in ("start_logits", "end_logits")]  # fmt: skip
                elif task == "classification":
                    distances.append(divergence(mine.logits[row], theirs.logits[row], problem))
                elif kind == "vectors":
                    states = (outputs.last_hidden_state[row][real] for outputs in (mine, theirs))
                    distances += [divergence(a, b, "vectors") for a, b in zip(*states, strict=True)]
                else:
                    whole = torch.ones(mine.logits.shape[1], dtype=torch.bool)  # of a decoder: no mask was given
                    counts = {"sequences": whole, "causal": torch.cat([real[1:], torch.tensor([False])])}.get(
                        kind, real
                    )
                    pairs = zip(mine.logits[row][counts], theirs.logits[row][counts], strict=True)
                    distances += [divergence(a, b, problem) for a, b in pairs]
    assert found[name] == pytest.approx(float(torch.stack(distances).mean()) / error, rel=1e-4)
    assert found[name] > 0


def test_a_divergence_that_is_cut_off_leaves_the_weight_as_it_was(monkeypatch):
    model, before = tiny_model("bert"), tiny_model("bert").state_dict()

    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity, "_distance", cut_off)
    with pytest.raises(KeyboardInterrupt):
        hessian_sensitivity(model, [tiny_batch(model)], method="divergence")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_batches_in_which_nothing_is_predicted_have_no_divergence():
    model = tiny_model("bert", "mlm")
    batch = tiny_batch(model)
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    with pytest.raises(ValueError, match="No prediction counts in these batches"):
        hessian_sensitivity(model, [batch], method="divergence")


def test_bits_by_divergence_go_where_rounding_moves_the_predictions():
    """A weight whose outputs nothing reads has no divergence, however large it is."""
    model = tiny_model("bert", "classification").double()
    first, second = (layer.output.dense for layer in model.bert.encoder.layer[:2])
    with torch.no_grad():
        first.weight.mul_(100)
        model.bert.encoder.layer[0].output.LayerNorm.weight.zero_()
        model.bert.encoder.layer[0].output.LayerNorm.bias.normal_()
    names = {module: name for name, module in model.named_modules()}
    found = hessian_sensitivity(model, [tiny_batch(model)], method="divergence", modules=[names[first], names[second]])
    assert found[names[first]] == 0 < found[names[second]]
    bits = allocate_bits(model, found, average_bits=5, choices=(2, 8))
    assert (bits[names[first]], bits[names[second]]) == (2, 8)


@pytest.mark.parametrize("gap", [0.0, 1e-4, 0.01, 0.2], ids="gap {}".format)
@pytest.mark.parametrize("sign", [1, -1], ids=["up", "down"])
@pytest.mark.parametrize("size", [3, 40, 400])
def test_eigenvalues_of_opposite_sign_and_like_size_are_told_apart(size, sign, gap):
    """A power iteration's value stands still between them: it was off by up to all of it."""
    generator = torch.Generator().manual_seed(size)
    values = torch.rand(size, generator=generator, dtype=torch.float64) * 3 - 1.5
    values[:2] = torch.tensor([sign * 5.0, -sign * 5.0 * (1 - gap)])
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    H = Q @ torch.diag(values) @ Q.T
    value, vector = top_eigenvalue(lambda v: H @ v, torch.randn(size, generator=generator, dtype=torch.float64))
    # within the tolerance of 1%; it may be the other one where they differ by no more
    assert abs(value) == pytest.approx(5.0, rel=0.02)
    assert (H @ vector - value * vector).norm() <= 0.1 * abs(value)


@pytest.mark.parametrize("method", ["eigenvalue", "trace", "fisher"])
@pytest.mark.parametrize("task", ["classification", "tokens", "clm"])
def test_how_the_examples_are_spread_over_batches_does_not_matter(task, method):
    family = "gpt2" if task == "clm" else "bert"
    model = tiny_model(family, task, attn="eager", num_labels=2).double()
    batch = tiny_batch(model, batch=6, length=10)
    labels = torch.tensor([0, 1, 1, 0, 1, 0]) if task == "classification" else batch["input_ids"] % 2
    if task != "classification":
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    whole = batch | {"labels": labels}
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 6))]
    names = [name for name, _ in model.named_modules() if name.endswith(("layer.1.output.dense", "h.1.mlp.c_proj"))]
    options = dict(method=method, modules=names, parts=1, probes=2, tolerance=1e-6)
    one, two = (hessian_sensitivity(model, data, **options) for data in ([whole], parts))
    # differences of gradients; a language model's loss is float32 in any model
    assert two == pytest.approx(one, rel=5e-3)


def test_the_eigenvalue_of_largest_magnitude_is_found():
    H = torch.diag(torch.tensor([1.0, -5.0, 3.0], dtype=torch.float64))
    value, vector = top_eigenvalue(lambda v: H @ v, torch.ones(3, dtype=torch.float64), tolerance=1e-9)
    assert value == pytest.approx(-5.0)
    assert vector.abs().argmax() == 1
    assert top_eigenvalue(lambda v: 0 * v, torch.ones(3))[0] == 0.0


def test_the_model_is_left_as_it_was():
    model, batches = model_and_batches(1)
    model.train()
    model.classifier.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hessian_sensitivity(model, batches, method="trace", probes=1)
    assert model.training and not model.classifier.weight.requires_grad and model.bert.pooler.dense.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bad_input_is_refused():
    model, batches = model_and_batches(1)
    with pytest.raises(ValueError, match="labels"):
        hessian_sensitivity(model, [{k: v for k, v in batches[0].items() if k != "labels"}])
    with pytest.raises(ValueError, match="empty"):
        hessian_sensitivity(model, [])
    with pytest.raises(ValueError, match="method"):
        hessian_sensitivity(model, batches, method="norm")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="gradient of .* is not finite"):
        hessian_sensitivity(model, batches, method="trace")
