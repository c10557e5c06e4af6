"""A user's program, which is read by the type checker in `make check` and not run.

`assert_type` fails where a name or its result has lost its type; each `type: ignore` marks a mistake that the checker
has to find, and is itself an error where it does not (`warn_unused_ignores`).
"""

from pathlib import Path

from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from typing_extensions import assert_type

import hf_compress as hfc


class Classifier(PreTrainedModel):
    """A model of a class of its own, which it keeps."""


def distil(teacher: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    student = hfc.make_student(teacher, num_hidden_layers=2, layers=[0, 2])
    tiny = hfc.TinyBertConfig("student", num_train_epochs=5, learning_rate=1e-4)
    trainer = hfc.TinyBertTrainer(student, tiny, teacher_model=teacher, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    config = hfc.DistillationConfig("student", alpha=0.5)
    hfc.DistillationTrainer(student, config, teacher_model=teacher, terms=[hfc.PatientStates(), hfc.Flows()]).train()
    assert_type(hfc.cache_teacher(teacher, [], "cache", top_k=8), hfc.CachedTeacher)
    hfc.make_student(teacher, num_hidden_layers=[2])  # type: ignore[arg-type]
    hfc.DistillationTrainer(student, config, terms=["hints"])  # type: ignore[list-item]
    hfc.TinyBertConfig("student", temperatur=2.0)  # type: ignore[call-arg]
    return student


def prune(model: Classifier, batches: DataLoader) -> Classifier:
    importance = hfc.head_importance(model, batches)
    assert_type(importance, Tensor)
    assert_type(hfc.neuron_importance(model, batches), Tensor)
    for layer in hfc.anatomy(model).layers:
        assert_type(layer.name, str)
    assert_type(hfc.prune_heads(model, {0: [1]}), Classifier)
    assert_type(hfc.prune_layers(hfc.prune_neurons(model, {0: range(8)}), keep=[0, 2]), Classifier)
    hfc.prune_heads(model, [0, 1])  # type: ignore[arg-type]
    hfc.prune(model, batches, sparsity=0.5, metric="flops")  # type: ignore[arg-type]
    callback = hfc.HeadPruning(0.25)
    Trainer(model, train_dataset=batches.dataset, callbacks=[callback]).train()
    return hfc.finish(model)


def quantize(model: Classifier, folder: Path) -> dict[str, float]:
    assert_type(hfc.quantize(model, bits=4, group_size=64), Classifier)
    hfc.quantize(model, bits="eight")  # type: ignore[arg-type]
    hfc.quantise(model)  # type: ignore[attr-defined]
    assert_type(hfc.export(model, folder, format="openvino"), Path)
    assert_type(hfc.load_gptq(folder), PreTrainedModel)
    hfc.export(model, folder)  # type: ignore[call-arg]
    return hfc.hessian_sensitivity(model, [])


def judge(model: nn.Module, folder: Path) -> str:
    report = hfc.compare({"teacher": "teacher", "student": folder}, eval_dataset=[])
    card = hfc.model_card(report, model="student", repo_id="me/student", license="apache-2.0")
    assert_type(hfc.measure(folder).stored_bytes, int)
    assert_type(hfc.publish(folder, "me/student", dry_run=True).files, dict[str, int])
    shrunk = hfc.shrink("bert-base-uncased", "reviews.csv", output=folder, speedup=10)
    assert_type(shrunk.reached, float | None)
    hfc.shrink("bert-base-uncased", "reviews.csv", speedup=10)  # type: ignore[call-arg]
    recipe = hfc.Recipe([{"quantize": {"bits": 8}}], model="bert-base-uncased", data="reviews.csv")
    assert_type(recipe.run("runs").output, Path)
    hfc.Recipe(stages="quantize", model=3)  # type: ignore[arg-type]
    return card.text + hfc.__version__
