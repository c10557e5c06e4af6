"""Terms: any of them together, in any trainer, in phases; each as its own trainer computes it."""

from itertools import combinations

import pytest
import torch
from helpers import tiny_model

import hf_compress as hfc
from distillation.data import rows
from distillation.training import assert_gradient_is_the_same_however_cut, config, pair, trainer_of
from hf_compress.distillation.losses.sums import Loss
from hf_compress.distillation.terms import Term, joint_signals

TERMS = {  # each by itself, and the trainer that has it
    "hints": (lambda: hfc.Hints(hints="1:2,2:4"), lambda: trainer_options("DistillationTrainer", hints="1:2,2:4")),
    "pkd": (hfc.PatientStates, lambda: trainer_options("PKDTrainer")),
    "fsp": (lambda: hfc.Flows(fsp_weight=3.0), lambda: trainer_options("FSPTrainer", fsp_weight=3.0)),
    "cosine": (hfc.LastStates, lambda: trainer_options("DistilBertTrainer")),
    "relational": (hfc.ExampleRelations, lambda: trainer_options("RelationalTrainer")),
    "bert-emd": (hfc.LayerTransport, lambda: trainer_options("BertEmdTrainer")),
    "tinybert": (hfc.TinyBertLayers, lambda: trainer_options("TinyBertTrainer", intermediate_share=1.0)),
    "minilm": (hfc.LastRelations, lambda: trainer_options("MiniLMTrainer", intermediate_share=1.0)),
}
SHARED = ("eval_loss", "eval_task_loss", "eval_soft_loss")


def trainer_options(name, **options):
    return getattr(hfc, name), options


def losses_of(trainer):
    return {n: v for n, v in trainer.evaluate().items() if n.endswith("_loss") and n not in SHARED}


def with_terms(folder, terms, student, teacher, data=None, kind=hfc.DistillationTrainer, phases=None, **options):
    data = rows() if data is None else data
    return kind(
        student, config(folder, kind.config_class, **options), teacher_model=teacher, terms=terms, phases=phases,
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_what_its_own_trainer_computes(name, tmp_path):
    make, of_trainer = TERMS[name]
    kind, options = of_trainer()
    student, teacher = pair(attn="eager")
    expected = losses_of(trainer_of(kind, tmp_path, student, teacher, **options))
    found = losses_of(with_terms(tmp_path, [make()], student, teacher))
    assert expected and found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("names", list(combinations(TERMS, 2)), ids="+".join)
def test_two_terms_are_the_sum_of_each_and_learn_together(names, tmp_path):
    student, teacher = pair(attn="eager")
    alone = [with_terms(tmp_path, [TERMS[name][0]()], student, teacher).evaluate() for name in names]
    both = with_terms(tmp_path, [TERMS[name][0]() for name in names], student, teacher, max_steps=2)
    found = both.evaluate()
    predictions = 0.5 * found["eval_task_loss"] + 0.5 * found["eval_soft_loss"]
    added = sum(one["eval_loss"] - predictions for one in alone)
    assert found["eval_loss"] == pytest.approx(predictions + added, rel=1e-5)
    assert len([n for n in found if n.endswith("_loss")]) == sum(
        len([n for n in one if n.endswith("_loss")]) for one in alone
    ) - len(SHARED)
    both.train()
    assert both.state.log_history[1]["grad_norm"] > 0


def test_the_gradient_of_terms_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    class Trainer(hfc.DistillationTrainer):
        def own_terms(self):
            return [hfc.PatientStates(learn_projection=True), hfc.Flows(), hfc.LastRelations()]

    assert_gradient_is_the_same_however_cut(tmp_path, Trainer)


@pytest.mark.parametrize("kind", [hfc.PKDTrainer, hfc.TinyBertTrainer, hfc.WordLevelTrainer], ids=lambda k: k.__name__)
def test_any_trainer_with_a_teacher_takes_terms_besides_its_own(kind, tmp_path):
    task = "mlm" if kind is hfc.WordLevelTrainer else None
    student, teacher = pair(task=task)
    data = rows(kind="tokens" if task else "classification")
    run = with_terms(tmp_path, [hfc.Flows()], student, teacher, data, kind=kind, max_steps=4)
    run.train()
    entries = [entry for entry in run.state.log_history if "fsp_loss" in entry]
    assert len(entries) == 4  # in both phases of TinyBERT, too
    assert len({*entries[0]} - {"fsp_loss"}) > 3


def test_phases_learn_what_they_name_at_their_own_rate(tmp_path):
    student, teacher = pair()
    phases = [
        hfc.Phase(0.5, [hfc.TinyBertLayers(), hfc.Flows()], predictions=False),
        hfc.Phase(0.25, [hfc.Hints(hints="2:4")], learning_rate=1e-4),
        hfc.Phase(0.25),
    ]
    run = with_terms(tmp_path, [], student, teacher, phases=phases, max_steps=8, logging_steps=1)
    run.train()
    entries = run.state.log_history[:8]
    named = [{n for n in entry if n.endswith("_loss")} for entry in entries]
    assert named[:4] == [{"embedding_loss", "hidden_state_loss", "attention_loss", "fsp_loss"}] * 4
    assert named[4:6] == [{"task_loss", "soft_loss", "hint_loss"}] * 2
    assert named[6:] == [{"task_loss", "soft_loss"}] * 2
    rates = [entry["learning_rate"] for entry in entries]  # linear decay in each: what the step before it left
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4, 5e-5, 1e-3, 5e-4])


def test_only_the_signals_of_the_phase_are_captured(tmp_path):
    student, teacher = pair()
    phases = [hfc.Phase(0.5, [hfc.LastRelations()], predictions=False), hfc.Phase(0.5)]
    run = with_terms(tmp_path, [], student, teacher, phases=phases)
    assert run.student_signals() == {"attention": [1]} and run.teacher_signals() == {"attention": [3]}
    run.train()
    assert run.student_signals() == {} == run.teacher_signals()


def test_a_term_of_the_user_is_two_methods(tmp_path):
    class Norms(Term):
        """The student's last states are as long as the teacher's."""

        name = "norms"

        def bind(self, student, teacher):
            super().bind(student, teacher)
            self.student_signals, self.teacher_signals = {"hidden_states": [2]}, {"hidden_states": [4]}

        def losses(self, student, teacher, inputs, state):
            weights, unit = self.tokens(student.hidden_states[2], inputs)
            mine, theirs = student.hidden_states[2].norm(dim=-1), teacher.hidden_states[4].norm(dim=-1)
            return {"norm_loss": Loss(((mine - theirs).square() * weights).sum(), unit)}

    student, teacher = pair()
    data = rows(4)
    found = with_terms(tmp_path, [Norms()], student, teacher, data).evaluate()["eval_norm_loss"]
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mine, theirs = (
            m(**inputs, output_hidden_states=True).hidden_states[-1].norm(dim=-1) for m in (student, teacher)
        )
    assert found == pytest.approx((mine - theirs)[inputs["attention_mask"].bool()].square().mean().item(), rel=1e-5)


def test_joint_signals_leave_out_what_nobody_reads():
    one, two = hfc.Hints(hints="1:2"), hfc.LayerTransport(attention_weight=0.0)
    teacher = tiny_model(seed=3)
    student = hfc.make_student(teacher, num_hidden_layers=2)
    for term in (one, two):
        term.bind(student, teacher)
    assert joint_signals([one, two], "student") == {"hidden_states": [1, 2]}
    assert joint_signals([], "student") == {}


def test_bad_input_is_refused_before_training(tmp_path):
    student, teacher = pair()
    with pytest.raises(ValueError, match="two terms of the kind 'fsp'"):
        with_terms(tmp_path, [hfc.Flows(), hfc.Flows()], student, teacher)
    with pytest.raises(ValueError, match="two terms of the kind 'patient'"):
        with_terms(tmp_path, [hfc.PatientStates()], student, teacher, kind=hfc.PKDTrainer)
    with pytest.raises(TypeError, match="terms are losses such as hfc.PatientStates"):
        with_terms(tmp_path, ["pkd"], student, teacher)
    with pytest.raises(ValueError, match=r"shares of the phases must be 0 or more and sum to 1, got \[0.5\]"):
        with_terms(tmp_path, [], student, teacher, phases=[hfc.Phase(0.5)])
    with pytest.raises(ValueError, match="A phase without terms and without predictions would learn nothing"):
        with_terms(tmp_path, [], student, teacher, phases=[hfc.Phase(1.0, predictions=False)])
    with pytest.raises(ValueError, match="PKDTrainer with these settings has terms of its own"):
        with_terms(tmp_path, [], student, teacher, kind=hfc.PKDTrainer, phases=[hfc.Phase(1.0)])
    with pytest.raises(ValueError, match="use DistillationTrainer, with all terms, such as hfc.Hints"):
        with_terms(tmp_path, [], student, teacher, hints="1:2", phases=[hfc.Phase(1.0)])
    with pytest.raises(ValueError, match="TheseusTrainer has no teacher whose layers could be compared"):
        with_terms(tmp_path, [hfc.Flows()], student, teacher, kind=hfc.TheseusTrainer)
    with pytest.raises(ValueError, match="Hints need pairs of hidden states"):
        with_terms(tmp_path, [hfc.Hints()], student, teacher)
    cache = hfc.cache_teacher(teacher, rows(), tmp_path / "cache")
    phases = [hfc.Phase(0.5), hfc.Phase(0.5, [hfc.Hints(hints="1:2")])]
    with pytest.raises(ValueError, match=r"needs the teacher's hidden states \[2\]"):  # of the second phase
        with_terms(tmp_path, [], student, cache, phases=phases)
