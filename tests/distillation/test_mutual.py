"""Deep mutual learning: every student learns from labels and from the others, and none through another."""

import pytest
import torch
from helpers import tiny_model
from transformers import TrainerCallback

from distillation.data import rows
from distillation.test_trainer import config, pair
from hf_compress.distillation.methods.mutual import MutualConfig, MutualTrainer
from hf_compress.distillation.teachers.cache import cache_teacher


def students(number, **changes):
    return [tiny_model("bert", seed=i, num_hidden_layers=i + 1, num_labels=3, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, **changes) for i in range(number)]  # fmt: skip


def reference(models, batch, alpha, temperature):
    """eq. 1 to 4 and 7, example by example in float64: the gradient of each student, from its own loss alone."""
    logits = [model.double()(batch["input_ids"], batch["attention_mask"]).logits for model in models]
    gradients = []
    for k, mine in enumerate(logits):
        loss = 0.0
        for i, label in enumerate(batch["labels"].tolist()):
            loss = loss - (1 - alpha) * mine[i].log_softmax(-1)[label]
            for other in [z for j, z in enumerate(logits) if j != k]:
                p, q = (other[i].detach() / temperature).softmax(-1), (mine[i] / temperature).softmax(-1)
                loss = loss + alpha * temperature**2 * (p * (p / q).log()).sum() / (len(models) - 1)
        gradients.append(torch.autograd.grad(loss / len(mine), models[k].classifier.weight, retain_graph=True)[0])
    return gradients


@pytest.mark.parametrize("number", [2, 3], ids=["two-students", "three-students"])
def test_one_step_follows_each_students_own_loss(number, tmp_path):
    data = rows(8, labels=3)
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    expected = reference(students(number, initializer_range=0.5), batch, alpha=0.4, temperature=2.0)
    model, *peers = students(number, initializer_range=0.5)
    before = [s.classifier.weight.detach().clone() for s in (model, *peers)]
    args = config(tmp_path, MutualConfig, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                  optim="sgd", learning_rate=1.0, max_grad_norm=0.0, alpha=0.4, temperature=2.0)  # fmt: skip
    trainer = MutualTrainer(model, args, peers=peers, train_dataset=data)
    trainer.train()
    for student, start, gradient in zip((model, *peers), before, expected, strict=True):
        torch.testing.assert_close((start - student.classifier.weight).double(), gradient, rtol=1e-3, atol=1e-5)
        assert gradient.norm() > 0.01
    assert {"task_loss", "soft_loss", "peer_1_task_loss", "peer_1_soft_loss"} <= trainer.state.log_history[0].keys()


def test_peers_are_resumed_and_are_no_part_of_the_saved_model(tmp_path):
    finals = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        options = dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=3e-3)
        for _ in range(1 + stops):
            torch.manual_seed(0)
            model, peer = students(2)
            trainer = MutualTrainer(model, config(folder, MutualConfig, **options), peers=[peer], train_dataset=rows())
            if stops and not (folder / "checkpoint-2").exists():
                trainer.add_callback(_Stop())
                trainer.train()
            else:
                trainer.train(resume_from_checkpoint=stops)
        finals.append((model, peer))
    for whole, resumed in zip(*finals, strict=True):
        for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(p, q)
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(model).from_pretrained(tmp_path / "saved")
    assert saved.num_parameters() == model.num_parameters()
    assert trainer.evaluate(rows(8))["eval_peer_1_task_loss"] > 0


class _Stop(TrainerCallback):
    """Ends the run after two steps, as a time limit would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_peers_that_cannot_learn_are_refused(tmp_path):
    student, teacher = pair()
    args = config(tmp_path, MutualConfig)
    for peers, message in (
        ([], "needs a list of one or more peers"),
        (teacher, "needs a list of one or more peers"),
        ([student], "Student and teacher are the same model"),
        ([tiny_model("bert", num_labels=5)], "the student has num_labels=2, the teacher num_labels=5"),
        ([cache_teacher(teacher, rows(8), tmp_path / "cache")], "Peers learn, so they must be models of their own"),
    ):
        with pytest.raises(ValueError, match=message):
            MutualTrainer(student, args, peers=peers, train_dataset=rows(8))
    with pytest.raises(ValueError, match="no student is a teacher alone"):
        config(tmp_path, MutualConfig, hints="1:2")
