"""Importances are the numbers their papers define, one example at a time, padding left out."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from silence import logits
from torch import nn

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy, in_features
from hf_compress.pruning.importance import every_other, search_layers
from hf_compress.pruning.importance.gates import gated, mean_absolute_gradients
from hf_compress.surgery import prune_heads, prune_layers

CASES = {
    "classification": ("bert", "classification"),
    "tokens": ("bert", "tokens"),
    "masked": ("modernbert", "mlm"),
    "answers": ("distilbert", "answers"),
    "seq2seq": ("bart", "seq2seq"),
    "causal": ("gpt2", "clm"),
    "image": ("vit", "image"),
}


def labelled(model: nn.Module, task: str, *, batch: int = 3) -> dict:
    """A batch whose examples have different numbers of labels."""
    inputs = tiny_batch(model, batch=batch)
    generator = torch.Generator().manual_seed(5)
    if task in ("classification", "image"):
        return {**inputs, "labels": torch.arange(batch) % 2}
    if task == "answers":
        return {
            **inputs,
            "start_positions": torch.tensor([1, 2, 0])[:batch],
            "end_positions": torch.tensor([2, 3, 1])[:batch],
        }
    ids = inputs["decoder_input_ids" if task == "seq2seq" else "input_ids"]
    labels = torch.randint(0, 2 if task == "tokens" else 60, ids.shape, generator=generator)
    if task != "seq2seq":
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, :2] = -100
    return {**inputs, "labels": labels}


def rows(batch: dict) -> list[dict]:
    count = len(next(iter(batch.values())))
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(count)]


def own_loss(model: nn.Module, example: dict) -> float:
    """The loss of one example in float64; Transformers computes that of language models in float32."""
    labels = example.get("labels")
    outputs = model(**example)
    if labels is None or labels.dim() == 1:
        return float(outputs.loss)
    scores = outputs.logits.double()
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        scores, labels = scores[:, :-1], labels[:, 1:]
    return float(F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100))


def by_finite_differences(model: nn.Module, batch: dict, modules: list, widths: list[int], places: list) -> dict:
    """The equation itself: each example alone, each gate moved a little up and down, absolute value, then the mean."""
    step = 1e-4
    sizes = [in_features(module) // width for module, width in zip(modules, widths, strict=True)]

    def loss_at(example: dict, place: tuple[int, int], value: float) -> float:
        gates = [torch.ones(1, size, dtype=torch.float64) for size in sizes]
        gates[place[0]][0, place[1]] = value
        shape = example["input_ids"].shape if "input_ids" in example else None
        with torch.no_grad(), gated(modules, gates, shape):
            return own_loss(model, example)

    result = {}
    for place in places:
        slopes = [(loss_at(row, place, 1 + step) - loss_at(row, place, 1 - step)) / (2 * step) for row in rows(batch)]
        result[place] = sum(abs(slope) for slope in slopes) / len(slopes)
    return result


def double(batch: dict) -> dict:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


@pytest.mark.parametrize("family, task", CASES.values(), ids=CASES)
def test_head_importance_is_the_mean_of_each_examples_absolute_gradient(family, task):
    model = tiny_model(family, task).double()
    batch = double(labelled(model, task))
    attentions = anatomy(model).attentions
    modules, widths = [a.output for a in attentions], [a.head_dim for a in attentions]
    places = [(layer, head) for layer in range(len(attentions)) for head in (0, 3)]
    expected = by_finite_differences(model, batch, modules, widths, places)
    importance = hfc.head_importance(model, [batch], normalize=False)
    for (layer, head), value in expected.items():
        assert float(importance[layer, head]) == pytest.approx(value, rel=1e-4, abs=1e-8)  # float32 losses


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "deberta-v2"])
def test_a_batch_says_what_its_examples_say_alone(family):
    """Families whose norms run in float32, too coarse for finite differences."""
    model = tiny_model(family).double()
    batch = labelled(model, "classification" if family == "deberta-v2" else "clm")
    alone = [hfc.head_importance(model, [row], normalize=False) for row in rows(batch)]
    together = hfc.head_importance(model, [batch], normalize=False)
    torch.testing.assert_close(together, sum(alone) / len(alone), rtol=1e-4, atol=1e-8)


def test_two_batches_weigh_examples_not_batches():
    model = tiny_model("bert")
    batch = labelled(model, "classification")
    split = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    torch.testing.assert_close(hfc.head_importance(model, split), hfc.head_importance(model, [batch]))


def test_the_absolute_value_is_taken_before_the_sum():
    """Two examples whose gradients point in opposite ways matter twice, though they cancel in the batch's gradient."""
    model = tiny_model("bert")
    one = labelled(model, "classification", batch=1)
    both = {**{k: torch.cat([v, v]) for k, v in one.items()}, "labels": torch.tensor([0, 1])}
    importance = hfc.head_importance(model, [both], normalize=False)
    separate = [hfc.head_importance(model, [row], normalize=False) for row in rows(both)]
    torch.testing.assert_close(importance, (separate[0] + separate[1]) / 2)
    attentions = anatomy(model).attentions
    gates = [torch.ones(2, 4, requires_grad=True) for _ in attentions]
    with gated([a.output for a in attentions], gates):
        gradients = torch.autograd.grad(model(**both).loss, gates)
    absolute_of_sum = torch.stack([gradient.sum(0).abs() for gradient in gradients])
    assert (importance - absolute_of_sum).abs().max() > 0.5 * importance.max()


def test_rows_are_normalised_and_say_where_heads_are_missing():
    model = prune_heads(tiny_model("bert"), {1: [0, 1, 2, 3], 2: [3]})
    importance = hfc.head_importance(model, [labelled(model, "classification")])
    assert importance.shape == (4, 4)
    assert importance[1].isnan().all()
    assert importance[2].isnan().tolist() == [False, False, False, True]
    torch.testing.assert_close(importance[[0, 2, 3]].nan_to_num().norm(dim=1), torch.ones(3))


def test_importance_leaves_no_trace():
    model = tiny_model("bert").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = hfc.head_importance(model, [labelled(model, "classification")])
    second = hfc.head_importance(model, [labelled(model, "classification")])
    assert torch.equal(first, second)  # no dropout
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2", "bart", "gemma3_text"])
def test_confidence_is_the_mean_largest_weight_without_the_last_token(family):
    changes = {} if family == "deberta-v2" else {"attn": "eager"}
    model = tiny_model(family, "classification" if family in ("bert", "deberta-v2") else None, **changes).double()
    batch = tiny_batch(model)
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True)
    lengths = batch["attention_mask"].sum(1)
    if family == "bart":
        full = torch.full((3,), 8)
        tables = [(a, lengths, lengths) for a in outputs.encoder_attentions]
        for own, cross in zip(outputs.decoder_attentions, outputs.cross_attentions, strict=True):
            tables += [(own, full, full), (cross, full, lengths)]
    else:
        tables = [(a, lengths, lengths) for a in outputs.attentions]
    expected = torch.zeros(len(tables), 4)
    for i, (table, queries, keys) in enumerate(tables):
        for head in range(4):
            largest = [float(table[b, head, t, : keys[b] - 1].max()) for b in range(3) for t in range(queries[b])]
            expected[i, head] = sum(largest) / len(largest)
    torch.testing.assert_close(hfc.head_importance(model, [batch], method="confidence"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family, task", [("bert", "classification"), ("gpt2", "clm"), ("modernbert", "mlm"), ("opt", "clm")]
)
def test_neuron_importance_is_the_mean_of_each_examples_absolute_gradient(family, task):
    model = tiny_model(family, task).double()
    batch = double(labelled(model, task))
    modules = [layer.feed_forward.output for layer in anatomy(model).layers]
    places = [(0, 0), (1, 7), (3, 47)]
    expected = by_finite_differences(model, batch, modules, [1] * 4, places)
    importance = hfc.neuron_importance(model, [batch])
    assert importance.shape == (4, modules[0].nx if family == "gpt2" else 48)
    for place, value in expected.items():
        assert float(importance[place]) == pytest.approx(value, rel=1e-4, abs=1e-8)


def test_a_layer_that_works_on_all_tokens_in_one_row_is_scored_while_it_trains(tmp_path):
    """Of one batch of examples with equally many labels the sum of |d loss / d gate| is the mean of their own."""
    model, steps = tiny_model("opt", "clm", dropout=0.0), {"begin": 0.0, "end": 1.0, "num_updates": 1}
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(2))
    expected = hfc.neuron_importance(model, [{"input_ids": ids, "labels": ids}])
    pruning = hfc.NeuronPruning(0.5, importance="gradient", scope="layer", **steps)
    args = arguments(tmp_path, max_steps=2, learning_rate=0.0, per_device_train_batch_size=4)
    data = [{"input_ids": row, "labels": row} for row in ids]
    OurTrainer(model, args, train_dataset=data, callbacks=[pruning]).train()
    for row, matrix in zip(expected, pruning._matrices, strict=True):
        gone = ~pruning.masks[matrix.name].flatten()
        assert gone.any() and row[gone].max() <= row[~gone].min()


def test_neuron_entropy_by_hand():
    model = tiny_model("bert")
    batch = tiny_batch(model)
    states = []
    part = anatomy(model).layers[2].feed_forward
    handle = part.output.register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))
    logits(model, batch)
    handle.remove()
    expected = []
    for neuron in range(48):
        active = [
            bool(states[0][b, t, neuron] > 0) for b in range(3) for t in range(10) if batch["attention_mask"][b, t]
        ]
        p = sum(active) / len(active)
        expected.append(-sum(q * math.log2(q) for q in (p, 1 - p) if q))
    importance = hfc.neuron_importance(model, [batch], method="entropy")
    torch.testing.assert_close(importance[2], torch.tensor(expected))
    assert 0 <= importance.min() <= importance.max() <= 1


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_weight_norms_by_hand(family):
    model = tiny_model(family)
    part = anatomy(model).layers[1].feed_forward
    neuron, width = 5, part.num_neurons
    outgoing = part.output.weight[neuron] if family == "gpt2" else part.output.weight[:, neuron]
    incoming = {
        "bert": lambda: [part.inputs[0].weight[neuron]],
        "gpt2": lambda: [part.inputs[0].weight[:, neuron]],
        "llama": lambda: [module.weight[neuron] for module in part.inputs],
        "modernbert": lambda: [part.inputs[0].weight[neuron], part.inputs[0].weight[width + neuron]],
    }[family]()
    output_norm = hfc.neuron_importance(model, method="output_norm")
    input_norm = hfc.neuron_importance(model, method="input_norm")
    assert float(output_norm[1, neuron]) == pytest.approx(float(outgoing.detach().abs().mean()))
    assert float(input_norm[1, neuron]) == pytest.approx(float(torch.cat(incoming).detach().abs().mean()))


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_block_influence_by_hand(family):
    model = tiny_model(family).double()
    batch = tiny_batch(model)
    seen = {}
    for i, layer in enumerate(anatomy(model).layers):
        layer.module.register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0], out)}))
    logits(model, batch)
    expected = []
    for i in range(4):
        before, after = (x[0] if isinstance(x, tuple) else x for x in seen[i])
        decoder = family == "bart" and i >= 2
        angles = []
        for b in range(3):
            for t in range(before.shape[1]):
                if decoder or batch["attention_mask"][b, t]:
                    x, y = before[b, t], after[b, t]
                    angles.append(1 - float(x @ y) / float(x.norm() * y.norm()))
        expected.append(sum(angles) / len(angles))
    torch.testing.assert_close(hfc.layer_importance(model, [batch]), torch.tensor(expected))


def test_a_layer_that_does_nothing_has_no_influence():
    model = tiny_model("llama")
    layer = anatomy(model).layers[2]
    layer.attention.output.weight.data.zero_()
    layer.feed_forward.output.weight.data.zero_()
    importance = hfc.layer_importance(model, [tiny_batch(model)])
    assert importance.argmin() == 2
    assert float(importance[2]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_layers, share, keep", [
    (12, 0.5, [0, 2, 4, 6, 8, 10]),
    (12, 1 / 3, [0, 1, 3, 4, 6, 7, 9, 10]),
    (12, 0.4, [0, 2, 4, 6, 8, 10]),  # floor(1 / 0.4) = 2
    (12, 0.75, [3, 7, 11]),
    (6, 0.6, [2, 5]),
])  # fmt: skip
def test_every_other_layer(num_layers, share, keep):
    assert every_other(num_layers, share) == keep


@pytest.mark.parametrize("share", [0.0, 1.0, 0.99])
def test_every_other_refuses_to_drop_nothing_or_everything(share):
    with pytest.raises(ValueError, match="share"):
        every_other(12, share)


def test_search_finds_the_layers_that_matter():
    """The score only sees whether layers 1 and 3 are in; the reference tries every pair on really pruned models."""
    model = tiny_model("bert").double()
    batch = tiny_batch(model)
    target = logits(prune_layers(tiny_model("bert").double(), [1, 3]), batch)

    def evaluate(candidate: nn.Module) -> float:
        return -float((logits(candidate, batch) - target).abs().sum())

    before = logits(model, batch)
    assert search_layers(model, evaluate, 2) == [1, 3]
    assert torch.equal(logits(model, batch), before)


def test_search_keeps_a_layer_of_each_stack():
    model = tiny_model("bart")
    keep = search_layers(model, lambda m: 0.0, 2)
    assert [i // 2 for i in keep] == [0, 1]
    with pytest.raises(ValueError, match="between 2 and 4"):
        search_layers(model, lambda m: 0.0, 1)


@pytest.mark.parametrize("call, message", [
    (lambda m: hfc.head_importance(m, []), "no example"),
    (lambda m: hfc.head_importance(m, [tiny_batch(m)]), "must hold labels"),
    (lambda m: hfc.head_importance(m, [tiny_batch(m)], method="luck"), "method must be"),
    (lambda m: hfc.head_importance(m, [], method="confidence"), "no tokens"),
    (lambda m: hfc.neuron_importance(m), "needs a dataloader"),
    (lambda m: hfc.neuron_importance(m, [], method="entropy"), "no tokens"),
    (lambda m: hfc.neuron_importance(m, method="luck"), "method must be"),
    (lambda m: hfc.layer_importance(m, []), "no tokens"),
], ids=range(8))  # fmt: skip
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model("bert"))


def test_examples_without_a_label_do_not_count():
    model = tiny_model("bert", "tokens")
    batch = labelled(model, "tokens")
    expected = hfc.head_importance(model, [{k: v[:2] for k, v in batch.items()}])
    batch["labels"][2] = -100
    torch.testing.assert_close(hfc.head_importance(model, [batch]), expected)
    sums = mean_absolute_gradients(model, [batch], [anatomy(model).attentions[0].output], [8])
    assert sums[0].isfinite().all()


@pytest.mark.parametrize("task", ["classification", "answers"])
def test_batches_in_which_some_examples_have_no_label_weigh_examples_as_well(task):
    """One label, or one answer beyond the text: each example that has one counts alike, in whatever batch it is."""
    model = tiny_model("bert", task).double()
    batch = double(labelled(model, task, batch=4 if task == "classification" else 3))
    names = ["labels"] if task == "classification" else ["start_positions", "end_positions"]
    without = {**batch, **{n: batch[n].clone() for n in names}}
    for n in names:
        without[n][1] = -100 if task == "classification" else batch["input_ids"].shape[1]
    one_by_one = [row for i, row in enumerate(rows(batch)) if i != 1]
    expected = [hfc.head_importance(model, [row], normalize=False) for row in one_by_one]
    split = [{k: v[:2] for k, v in without.items()}, {k: v[2:] for k, v in without.items()}]
    found = hfc.head_importance(model, split, normalize=False)
    torch.testing.assert_close(found, sum(expected) / len(expected), rtol=1e-4, atol=1e-8)


def test_a_budget_is_not_lost_by_an_example_without_a_label():
    """Its loss is not a number, so no layer would be worth anything."""
    model = tiny_model("bert")
    batch = labelled(model, "classification")
    batch["labels"][1] = -100
    labelled_rows = [row for i, row in enumerate(rows(batch)) if i != 1]
    expected = hfc.prune(tiny_model("bert"), labelled_rows, sparsity=0.3)
    found = hfc.prune(model, [batch], sparsity=0.3)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
