"""Self-distillation: exits are ordinary shallower models, they learn from the last layer, and it does not from them."""

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForSequenceClassification

from distillation.data import rows
from distillation.training import config, padded
from hf_compress.distillation.methods.self_distillation import SelfDistillationConfig, SelfDistillationTrainer


def trainer(tmp_path, model=None, data=None, **options):
    data = rows() if data is None else data
    args = config(tmp_path, SelfDistillationConfig, **options)
    return SelfDistillationTrainer(model or tiny_model(), args, train_dataset=data, eval_dataset=data)


def run_once(model, data):
    inputs = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True), inputs


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "classification"), ("roberta", "tokens"), ("deberta-v2", "classification"), ("gpt2", "clm"),
     ("llama", "clm"), ("modernbert", "mlm"), ("distilbert", "answers")],
)  # fmt: skip
def test_an_exit_is_the_model_of_the_layers_below_it(family, task, tmp_path):
    """Losses of the exits are those of the pruned models; in training every exit learns."""
    model, data = tiny_model(family, task, seed=3), rows(8, kind=task)
    run = trainer(tmp_path, model, data, exits="1,3", max_steps=2)
    run.train()
    found = run.evaluate()
    outputs, _ = run_once(model, data)
    assert found["eval_task_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)
    for layer in (1, 3):
        exit_model = run.exit_model(layer)
        assert len(exit_model.state_dict()) < len(model.state_dict())
        outputs, _ = run_once(exit_model, data)
        assert found[f"eval_exit_{layer}_task_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


def test_a_run_computes_the_equation_and_padding_does_not_matter(tmp_path):
    model, data = tiny_model(seed=3, initializer_range=0.3), rows(4)
    outputs, inputs = run_once(model, data)
    real, last = inputs["attention_mask"].bool(), outputs.hidden_states[-1]
    for batch in (data, padded(data)):
        torch.manual_seed(0)
        run = trainer(tmp_path, model, batch, exits="2", alpha=0.3, temperature=2.0, hint_weight=0.7)
        W = run.training_state.hint_2.weight
        with torch.no_grad():
            logits = run.exit_model(2)(**inputs).logits.double()
            hint = (outputs.hidden_states[2] @ W.T - last)[real].square().mean(dim=-1).mean()
        q, p = (logits / 2).softmax(dim=-1), (outputs.logits.double() / 2).softmax(dim=-1)
        soft = 4 * (p * (p / q).log()).sum(dim=-1).mean()
        task = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        expected = outputs.loss + 0.7 * task + 0.3 * soft + 0.7 * hint
        assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_no_gradient_flows_into_the_targets(tmp_path):
    """The last layer and the model's own head learn from the labels alone, whatever the exits do."""
    after = []
    for alpha, hint_weight in ((0.0, 0.0), (1.0, 5.0)):
        model = tiny_model(seed=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        run = trainer(tmp_path, model, rows(4), alpha=alpha, hint_weight=hint_weight, max_steps=1, optim="sgd",
                      max_grad_norm=0.0, learning_rate=1.0, seed=5)  # fmt: skip
        run.train()
        after.append({n: p.detach() for n, p in model.named_parameters()})
    for name in ("classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.3.output.dense.weight"):
        torch.testing.assert_close(after[0][name], after[1][name], rtol=0, atol=1e-6)
    for name in ("bert.encoder.layer.2.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        assert (after[0][name] - after[1][name]).abs().max() > 1e-3


def test_exits_are_saved_beside_the_model_resumed_and_taken_out(tmp_path):
    model = tiny_model(seed=3)
    names = set(model.state_dict())
    run = trainer(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert set(saved.state_dict()) == names
    again = trainer(tmp_path, tiny_model(seed=4), max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in again.training_state.state_dict().items():
        torch.testing.assert_close(value, run.training_state.state_dict()[name], msg=name)
    assert any(name.startswith("exit_2.classifier") for name in again.training_state.state_dict())
    exit_model = run.exit_model(2)
    exit_model.save_pretrained(tmp_path / "exit")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exit")
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(run_once(loaded, rows(4))[0].logits, run_once(exit_model, rows(4))[0].logits)


def test_bad_input_is_refused_before_training(tmp_path):
    for exits, message in [("4", "between layer 1 and 3, below the last, got 4"), ("x", "numbers of layers")]:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, exits=exits)
    with pytest.raises(ValueError, match="maps the layers of one stack"):
        trainer(tmp_path, tiny_model("bart"), rows(kind="seq2seq"))
    with pytest.raises(ValueError, match="reads text, but ViTForImageClassification pixel_values"):
        trainer(tmp_path, tiny_model("vit"), rows(kind="image"))
    with pytest.raises(ValueError, match="There is no exit at layer 3: the exits are"):
        trainer(tmp_path, exits="1").exit_model(3)
    with pytest.raises(ValueError, match="there is no other model: hints=1:2"):
        SelfDistillationConfig(str(tmp_path), hints="1:2")


def test_weights_that_zero3_cut_are_refused(tmp_path):
    """There each parameter is empty outside its module's forward, and is marked."""
    run = trainer(tmp_path)
    next(run.training_state.exit_1.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="which ZeRO-3 has cut into pieces. Use ZeRO-2, FSDP2 or DDP"):
        run.train()
