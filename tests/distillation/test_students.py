"""Students keep what they can of the teacher, and are ordinary models."""

import pytest
import torch
from helpers import FAMILIES, tiny_batch, tiny_model

from hf_compress.distillation.students import make_student
from hf_compress.model.anatomy import anatomy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_is_the_teacher(family):
    teacher = tiny_model(family)
    student = make_student(teacher)
    batch = tiny_batch(teacher)
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)
    assert student is not teacher and student.config is not teacher.config


@pytest.mark.parametrize("layers", ["first", "last", "skip"])
def test_layers_are_the_chosen_ones(layers):
    teacher = tiny_model("bert")
    student = make_student(teacher, num_hidden_layers=2, layers=layers)
    numbers = {"first": [0, 1], "last": [2, 3], "skip": [1, 3]}[layers]
    for mine, number in zip(student.bert.encoder.layer, numbers, strict=True):
        for name, weight in teacher.bert.encoder.layer[number].state_dict().items():
            assert torch.equal(mine.state_dict()[name], weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_students_run_save_and_load(family, tmp_path):
    teacher = tiny_model(family)
    depth = 1 if family == "bart" else 2
    student = make_student(teacher, num_hidden_layers=depth, hidden_size=16, intermediate_size=24)
    batch = tiny_batch(teacher)
    with torch.no_grad():
        logits = student(**batch).logits
    assert anatomy(student).hidden_size == 16
    assert {layer.feed_forward.num_neurons for layer in anatomy(student).layers} == {24}
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(teacher).from_pretrained(tmp_path)(**batch).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_silent_heads_and_neurons_changes_nothing(family):
    """Two heads (or key groups) and half of the neurons are silenced; the narrower student drops just those."""
    teacher = tiny_model(family).double()
    for layer in anatomy(teacher).layers:
        for attention in layer.attentions:
            columns = attention.output.weight.T if hasattr(attention.output, "in_features") else attention.output.weight
            columns.data[8:24] = 0  # heads 1 and 2 of 4
            if attention.num_key_value_heads == 2:
                columns.data[8:16] = columns.data[24:32]  # a whole key group, heads 2 and 3, instead
                columns.data[16:32] = 0
        columns = layer.feed_forward.output.weight
        columns = columns.T if hasattr(layer.feed_forward.output, "in_features") else columns
        columns.data[::2] = 0
    neurons = anatomy(teacher).layers[0].feed_forward.num_neurons
    student = make_student(teacher, intermediate_size=neurons // 2)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(teacher).items()}
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_fewer_heads_of_explicit_size_keep_the_important_ones(family):
    teacher = tiny_model(family)
    for layer in anatomy(teacher).layers:
        layer.attention.output.weight.data[:, 16:] = 0  # the second key group
    student = make_student(teacher, num_attention_heads=2)
    for mine, theirs in zip(anatomy(student).layers, anatomy(teacher).layers, strict=True):
        assert (mine.attention.num_heads, mine.attention.num_key_value_heads) == (2, 1)
        if mine.attention.head_dim == 8:
            assert torch.equal(mine.attention.query.weight, theirs.attention.query.weight[:16])


def test_fresh_weights_are_not_the_teachers():
    teacher = tiny_model("bert")
    student = make_student(teacher, intermediate_size=24, weights="fresh")
    mine, theirs = student.bert.encoder.layer[0], teacher.bert.encoder.layer[0]
    assert torch.equal(mine.attention.self.query.weight, theirs.attention.self.query.weight)
    rows = mine.intermediate.dense.weight
    assert not any(torch.equal(rows[0], row) for row in theirs.intermediate.dense.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_hidden_layers=5), "between 1 and the teacher's 4, got 5"),
        (dict(layers=[0, 7]), r"layers=\[0, 7\] must name one or more of the teacher's layers, 0 to 3"),
        (dict(num_hidden_layers=1, layers=[0, 1]), "must name 1 of the teacher's layers"),
        (dict(layers="middle"), "layers must be one of"),
        (
            dict(hidden_size=30),
            "num_attention_heads must divide hidden_size: got num_attention_heads=4, hidden_size=30",
        ),
        (dict(intermediate_size=0), "intermediate_size must be at least 1, got 0"),
        (dict(weights="some"), "weights must be `copy` or `fresh`"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_student(tiny_model("bert"), **options)


def test_grouped_heads_are_kept_whole():
    with pytest.raises(ValueError, match="num_attention_heads=1 must be a multiple of 2"):
        make_student(tiny_model("llama"), num_attention_heads=1)
