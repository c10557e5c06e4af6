"""Layers frozen from below: what they compute does not change, the rest learns, stage after stage, and in a recipe."""

import pytest
import torch
from helpers import default_task, tiny_batch
from peft import LoraConfig, get_peft_model

import hf_compress as hfc
from distillation.data import rows
from distillation.training import config, pair, trainer_of
from hf_compress.distillation.phases import parameters_of
from hf_compress.recipe.stages import read_stages


def states_of(model, batch):
    with torch.no_grad():
        out = model.eval()(**batch, output_hidden_states=True)
    return [*out["encoder_hidden_states"], *out["decoder_hidden_states"]] if "encoder_hidden_states" in out else list(
        out.hidden_states
    )  # fmt: skip


def moved(model, before):
    """The names of the parameters that are others now."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "llama", "gpt2", "bart"])
def test_what_frozen_layers_compute_stays_and_everything_else_learns(family, tmp_path):
    """Relative positions, tied heads and normed embeddings included: found without knowing the family."""
    student, teacher = pair(family, num_hidden_layers=2) if family == "bart" else pair(family)
    batch, before = tiny_batch(student), copies(student)
    expected = states_of(student, batch)
    needed = torch.autograd.grad(
        student(**batch, output_hidden_states=True)[
            "encoder_hidden_states" if family == "bart" else "hidden_states"
        ][1].sum(), list(student.parameters()), allow_unused=True,
    )  # fmt: skip
    needed = {name for (name, _), g in zip(student.named_parameters(), needed, strict=True) if g is not None}
    task = default_task(family)
    data = rows(kind=task)
    trainer_of(hfc.DistillationTrainer, tmp_path, student, teacher, data, frozen_layers=1, weight_decay=0.1).train()
    found = states_of(student, batch)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[2], expected[2])
    assert set(before) - moved(student, before) == needed


def test_a_stage_is_the_training_of_a_model_whose_layers_are_frozen_by_hand(tmp_path):
    """Clipped by the norm of what learns alone, over two micro-batches a step."""
    results = []
    for is_by_hand in (True, False):
        student, teacher = pair()
        for name, parameter in student.named_parameters() if is_by_hand else ():
            parameter.requires_grad_(not name.startswith(("bert.embeddings", "bert.encoder.layer.0")))
        run = trainer_of(hfc.DistillationTrainer, tmp_path, student, teacher, max_grad_norm=0.05, max_steps=2,
                         gradient_accumulation_steps=2, frozen_layers=int(not is_by_hand))  # fmt: skip
        torch.manual_seed(0)
        run.train()
        results.append((copies(student), run.state.log_history[0]["grad_norm"]))
    (expected, norm), (found, own_norm) = results
    assert own_norm == pytest.approx(norm, rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", [hfc.TinyBertTrainer, hfc.FSPTrainer], ids=["tinybert", "flows"])
@pytest.mark.parametrize("is_adapted", [False, True], ids=["frozen", "adapters"])
def test_losses_of_embeddings_that_do_not_learn_are_no_hindrance(kind, is_adapted, tmp_path):
    """Where nothing of what is read learns, the training is refused; checkpointing that hides layers, too."""
    student, teacher = pair()
    if is_adapted:
        lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        student = get_peft_model(student, lora)
    else:
        student.bert.embeddings.requires_grad_(False)
    before = copies(student)
    trainer_of(kind, tmp_path, student, teacher, max_steps=2).train()
    found = moved(student, before)
    assert found and not any("embeddings" in name for name in found)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("classifier" in name)
    with pytest.raises(RuntimeError, match="a frozen student cannot learn from inner layers"):
        trainer_of(kind, tmp_path, student, teacher, max_steps=2).train()


def test_one_layer_after_the_other(tmp_path):
    """MobileBERT: in stage l layer l learns from its hint, with the embeddings in the first; then everything."""
    student, teacher = pair()
    phases = [hfc.Phase(0.25, [hfc.Hints(hints=f"{n}:{2 * n}")], predictions=False, frozen=n - 1) for n in (1, 2)]
    data, seen = rows(), []

    class Trainer(hfc.DistillationTrainer):
        def training_step(self, *args, **kwargs):
            seen.append(copies(student))
            return super().training_step(*args, **kwargs)

    run = Trainer(student, config(tmp_path, max_steps=4, weight_decay=0.1, frozen_layers=0), teacher_model=teacher,
                  phases=[*phases, hfc.Phase(0.5)], train_dataset=data)  # fmt: skip
    run.train()
    seen.append(copies(student))
    names = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in zip(seen, seen[1:], strict=False)]
    assert {n.split(".")[1] + n.split(".")[3] * ("layer" in n.split(".")) for n in names[0]} == {
        "embeddings",
        "encoder0",
    }
    assert all(n.startswith("bert.encoder.layer.1.") for n in names[1]) and names[1]
    assert any(n.startswith("bert.embeddings") for n in names[3]) and any(n.startswith("classifier") for n in names[3])


def test_pruning_goes_on_in_frozen_layers_and_is_finished(tmp_path):
    student, teacher = pair()
    callback = hfc.HeadGates(5.0, gate_rate=3000.0)
    run = hfc.DistillationTrainer(student, config(tmp_path, max_steps=4, frozen_layers=1), teacher_model=teacher,
                                  callbacks=[callback], train_dataset=rows())  # fmt: skip
    run.train()
    assert hfc.anatomy(student).attentions[0].num_heads < 4
    student.save_pretrained(tmp_path / "saved")
    again, batch = type(student).from_pretrained(tmp_path / "saved"), tiny_batch(student)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, student.eval()(**batch).logits)


def test_a_recipe_says_what_is_frozen():
    (stage,) = read_stages([{"distil": {"method": "tinybert", "frozen_layers": 2}}])
    assert stage.own.frozen_layers == 2


def test_the_leaves_of_a_graph_are_its_parameters():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    assert parameters_of((a * 2 + torch.ones(2)) @ b) == {a, b}
    assert parameters_of((a * c).detach() + b) == {b} and parameters_of(torch.ones(1)) == set()


def test_what_cannot_be_frozen_is_refused(tmp_path):
    student, teacher = pair()
    for options, message in (
        ({"frozen_layers": 3}, "counted from below, 0 to 2 of this student, got 3"),
        ({"frozen_layers": -1}, "frozen_layers is a number of layers from below"),
        ({"frozen_layers": 1, "torch_compile": True}, "without torch_compile"),
        ({"frozen_layers": 1, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "'use_reentrant': False"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(hfc.DistillationTrainer, tmp_path, student, teacher, **options)
    with pytest.raises(ValueError, match="each learns whole"):
        hfc.MutualConfig(str(tmp_path), frozen_layers=1)
    with pytest.raises(ValueError, match="learn in all layers"):
        hfc.ScaleConfig(str(tmp_path), frozen_layers=1)
    phases = [hfc.Phase(1.0, [hfc.Hints(hints="1:2")], predictions=False, frozen=2)]
    run = hfc.DistillationTrainer(student, config(tmp_path), teacher_model=teacher, phases=phases, train_dataset=rows())
    before = copies(student)
    with pytest.raises(ValueError, match="read nothing above the 2 layers that are frozen"):
        run.train()
    assert not moved(student, before)
