"""DistillationTrainer is a drop-in `Trainer`: every task, every option, the same gradients however batches are cut."""

from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from runtime_models import tiny_tokenizer
from transformers import EarlyStoppingCallback

from distillation.data import rows
from distillation.training import assert_gradient_is_the_same_however_cut, config, padded, pair
from hf_compress.distillation.methods.tinybert import TinyBertConfig, TinyBertTrainer
from hf_compress.distillation.students import make_student
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.surgery.vocabulary import prune_vocabulary

TASKS = [
    ("bert", "classification", "classification", {}),
    ("bert", "classification", "multi", dict(num_labels=3, problem_type="multi_label_classification")),
    ("bert", "classification", "regression", dict(num_labels=1)),
    ("roberta", "tokens", "tokens", dict(num_labels=3)),
    ("distilbert", "answers", "answers", {}),
    ("electra", "mlm", "mlm", {}),
    ("modernbert", "mlm", "mlm", {}),
    ("deberta-v2", "classification", "classification", {}),
    ("gpt2", "clm", "clm", {}),
    ("llama", "clm", "clm", {}),
    ("bart", "seq2seq", "seq2seq", {}),
    ("vit", "image", "image", {}),
]


@pytest.mark.parametrize(("family", "task", "kind", "changes"), TASKS, ids=[f"{f}-{k}" for f, _, k, _ in TASKS])
def test_every_task_trains_evaluates_and_predicts(family, task, kind, changes, tmp_path):
    _, teacher = pair(family, task, **changes)
    student = make_student(teacher, num_hidden_layers=1 if family == "bart" else 2, hidden_size=16)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    labels = changes.get("num_labels", 2)
    args = config(tmp_path, hints="1:2", eval_strategy="steps", eval_steps=2, max_steps=6, learning_rate=3e-3)
    data = rows(kind=kind, labels=labels), rows(8, kind=kind, labels=labels, seed=1)
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data[0], eval_dataset=data[1])
    start = trainer.evaluate(data[0])
    trainer.train()
    assert trainer.evaluate(data[0])["eval_loss"] < start["eval_loss"]
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in steps:
        assert {"task_loss", "soft_loss", "hint_loss"} <= entry.keys()
        parts = 0.5 * entry["task_loss"] + 0.5 * entry["soft_loss"] + entry["hint_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
    prediction = trainer.predict(data[1])
    assert {"test_loss", "test_task_loss", "test_soft_loss", "test_hint_loss"} <= prediction.metrics.keys()
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad


@pytest.mark.parametrize("accumulation", [4, 8])
@pytest.mark.parametrize(
    ("kind", "trainer_class", "options"),
    [
        ("classification", DistillationTrainer, dict(hints="1:2")),
        ("tokens", DistillationTrainer, dict(hints="1:2")),
        ("clm", DistillationTrainer, dict(hints="2:4")),
        ("classification", TinyBertTrainer, dict(intermediate_share=1.0)),
        ("classification", TinyBertTrainer, dict(intermediate_share=0.0)),
    ],
    ids=["sequence", "tokens", "causal", "tinybert-intermediate", "tinybert-prediction"],
)
def test_gradients_do_not_depend_on_how_the_batch_is_cut(kind, trainer_class, options, accumulation, tmp_path):
    assert_gradient_is_the_same_however_cut(tmp_path, trainer_class, kind, accumulation, **options)


def test_padding_changes_no_gradient(tmp_path):
    """Longer padding of the same examples leaves hint and attention losses as they are."""
    losses = []
    for length in (12, 20):
        student, teacher = pair()
        data = rows(4)
        if length > 12:
            data = padded(data)
        args = config(tmp_path, TinyBertConfig, intermediate_share=1.0, max_steps=1)
        trainer = TinyBertTrainer(student, args, teacher_model=teacher, train_dataset=data, eval_dataset=data)
        losses.append(trainer.evaluate())
    for name in ("eval_embedding_loss", "eval_hidden_state_loss", "eval_attention_loss"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-5)


def test_what_trainer_takes_still_works(tmp_path):
    """Metrics, early stopping on one of our terms, label smoothing, bf16, checkpointing, best model."""
    _, teacher = pair(num_labels=3)
    student = make_student(teacher, num_hidden_layers=2, hidden_size=16)  # narrower: learns through a projection
    args = config(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                  label_smoothing_factor=0.1, bf16=True, gradient_checkpointing=True, load_best_model_at_end=True,
                  gradient_checkpointing_kwargs={"use_reentrant": False}, metric_for_best_model="eval_soft_loss",
                  greater_is_better=False, save_total_limit=2, hints="1:2")  # fmt: skip

    def compute_metrics(prediction):
        assert prediction.predictions.shape == (8, 3)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=rows(labels=3), eval_dataset=rows(8, labels=3, seed=1),
        compute_metrics=compute_metrics, callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
    )  # fmt: skip
    trainer.train()
    assert "eval_accuracy" in trainer.state.log_history[-2] or "eval_accuracy" in trainer.evaluate()
    assert trainer.state.best_model_checkpoint is not None
    saved = {p.name for p in tmp_path.glob("checkpoint-*/*.safetensors")}
    assert saved == {"model.safetensors", "training_state.safetensors"}
    loaded = type(student).from_pretrained(trainer.state.best_model_checkpoint)
    assert set(loaded.state_dict()) == set(student.state_dict())
    assert not any("training_state" in name for name in student.state_dict())


def test_hyperparameter_search_makes_a_new_student_for_each_trial(tmp_path):
    optuna = pytest.importorskip("optuna")
    _, teacher = pair()
    trainer = DistillationTrainer(
        None, config(tmp_path, hints="1:2", eval_strategy="steps", eval_steps=3), teacher_model=teacher,
        model_init=lambda trial: make_student(teacher, num_hidden_layers=2), train_dataset=rows(), eval_dataset=rows(8),
    )  # fmt: skip
    best = trainer.hyperparameter_search(lambda trial: {"alpha": trial.suggest_float("alpha", 0.1, 0.9)}, n_trials=2)
    assert isinstance(best.run_id, str) and optuna


def test_torch_compile_runs_with_prediction_losses(tmp_path):
    student, teacher = pair()
    args = config(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows()).train()
    with pytest.raises(ValueError, match="reads inner layers of the student, which torch_compile hides"):
        args = config(tmp_path, torch_compile=True, torch_compile_backend="eager", hints="1:2")
        DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows())


def test_learning_from_the_teacher_alone_needs_no_labels(tmp_path):
    student, teacher = pair()
    data = rows().remove_columns("labels")
    trainer = DistillationTrainer(student, config(tmp_path, alpha=1.0), teacher_model=teacher, train_dataset=data)
    trainer.train()
    assert "task_loss" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match=r"alpha=0.5 mixes in the task loss, but the batch has no labels"):
        DistillationTrainer(student, config(tmp_path), teacher_model=teacher, train_dataset=data).train()


def test_noise_is_for_training_only(tmp_path):
    student, teacher = pair()
    results = []
    for noise in (0.0, 5.0):
        args = config(tmp_path, teacher_noise=noise, teacher_noise_share=1.0)
        trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows(), eval_dataset=rows(8))
        trainer.args.prediction_loss = "logits"
        results.append(trainer.evaluate()["eval_soft_loss"])
    assert results[0] == results[1]


def test_a_teacher_is_loaded_by_folder_and_keeps_its_class(tmp_path):
    student, teacher = pair()
    teacher.save_pretrained(tmp_path / "teacher")
    trainer = DistillationTrainer(student, config(tmp_path), teacher_model=tmp_path / "teacher", train_dataset=rows())
    assert type(trainer.teacher) is type(teacher)
    with pytest.raises(ValueError, match="There is no teacher at"):
        DistillationTrainer(student, config(tmp_path), teacher_model=str(tmp_path / "none"), train_dataset=rows())


def test_padding_of_a_vocabulary_is_accepted(tmp_path):
    _, teacher = pair("llama")
    student = tiny_model("llama", vocab_size=72)
    trainer = DistillationTrainer(student, config(tmp_path), teacher_model=teacher, train_dataset=rows(kind="clm"))
    trainer.train()
    assert trainer.state.log_history[0]["soft_loss"] > 0


def test_a_teacher_of_other_words_is_not_taken_for_padding(tmp_path):
    """A vocabulary that was cut is smaller, too; the teacher's own tokenizer tells."""
    tokenizer = tiny_tokenizer()
    tiny_model("bert").save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    student = tiny_model("bert", seed=1)
    smaller = prune_vocabulary(student, tokenizer, keep=range(20, 40))
    few = rows().map(lambda row: {"input_ids": [id % len(smaller) for id in row["input_ids"]]})
    teacher = type(student).from_pretrained(tmp_path / "teacher")
    said = "of the .* in the student's tokenizer have other numbers in .*teacher"
    for given in (teacher, str(tmp_path / "teacher")):
        with pytest.raises(ValueError, match=said):
            DistillationTrainer(
                student, config(tmp_path), teacher_model=given, train_dataset=few, processing_class=smaller
            )
    with pytest.raises(ValueError, match=said):
        cache_teacher(teacher, few, tmp_path / "cache", processing_class=smaller)
    assert not (tmp_path / "cache").exists()
    made = make_student(teacher, num_hidden_layers=2)  # from the same folder, as its config says
    prune_vocabulary(made, tokenizer, keep=range(20, 40))
    with pytest.raises(ValueError, match=said):
        DistillationTrainer(made, config(tmp_path), teacher_model=teacher, train_dataset=few, processing_class=smaller)
    bare = tiny_model("bert", vocab_size=1024)  # of no folder: most of its rows are not padding
    with pytest.raises(ValueError, match="Only padding of the same vocabulary"):
        DistillationTrainer(student, config(tmp_path), teacher_model=bare, train_dataset=few, processing_class=smaller)
    same = tiny_model("bert", seed=1)
    DistillationTrainer(same, config(tmp_path), teacher_model=teacher, train_dataset=rows(), processing_class=tokenizer)
    prune_vocabulary(teacher, tokenizer, keep=range(20, 40))  # both were cut; its folder has the words of before
    DistillationTrainer(student, config(tmp_path), teacher_model=teacher, train_dataset=few, processing_class=smaller)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "llama"])
def test_a_folder_without_a_tokenizer_tells_nothing_of_words(family, tmp_path):
    """Transformers opens one all the same, of the family's special tokens under their usual numbers."""
    tiny_model(family).save_pretrained(tmp_path / "teacher")
    teacher = type(tiny_model(family)).from_pretrained(tmp_path / "teacher")
    DistillationTrainer(
        tiny_model(family, seed=1), config(tmp_path), teacher_model=teacher, train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def test_words_that_both_models_were_given_are_no_other_words(tmp_path):
    """As a decoder without padding is given some: the tokenizer beside the teacher does not know it."""
    tokenizer = tiny_tokenizer()
    (student := tiny_model("bert", seed=1)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    teacher = type(student).from_pretrained(tmp_path / "teacher")
    tokenizer.add_tokens(["film-maker"])
    for model in (student, teacher):
        model.resize_token_embeddings(len(tokenizer))
    DistillationTrainer(
        student, config(tmp_path), teacher_model=teacher, train_dataset=rows(), processing_class=tokenizer
    )


def refusal(tmp_path, student=None, teacher=None, data=None, **options):
    own_student, own_teacher = pair()
    return DistillationTrainer(
        student or own_student, config(tmp_path, **options), teacher_model=teacher or own_teacher,
        train_dataset=rows() if data is None else data,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(teacher=tiny_model("bert", num_labels=5)), "the student has num_labels=2, the teacher num_labels=5"),
        (dict(teacher=tiny_model("bert", vocab_size=99)), "the student has vocab_size=64, the teacher vocab_size=99"),
        (
            dict(teacher=tiny_model("bert", max_position_embeddings=32)),
            "The teacher reads at most 32 positions, the stu",
        ),
        (
            dict(
                teacher=tiny_model("bert", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}),
                student=tiny_model("bert", seed=1, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}),
            ),
            "must number their labels alike",
        ),
        (dict(data=rows().select([])), "The training set is empty"),
        (dict(data=rows(labels=4)), r"labels \[2, 3\] in `labels`, but student and teacher know 0 to 1"),
        (dict(hints="1:9"), "points to hidden state 9 of the teacher, which has 0 .* to 4"),
        (dict(hints="one"), "hints are pairs student:teacher"),
        (dict(alpha=1.5), "alpha is the share of the soft loss and must lie between 0 and 1, got 1.5"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(prediction_loss="hinge"), "prediction_loss must be one of"),
        (dict(teacher_noise=-1.0), "teacher_noise must be 0 or more"),
        (dict(teacher_bits=3), "teacher_bits must be 8, 4 or None, got 3"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_bad_input_is_refused_before_training(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        refusal(tmp_path, **options)


def test_the_teacher_must_be_another_model(tmp_path):
    student, _ = pair()
    with pytest.raises(ValueError, match="Student and teacher are the same model"):
        refusal(tmp_path, student=student, teacher=student)
    with pytest.raises(ValueError, match="needs a teacher"):
        DistillationTrainer(student, config(tmp_path), train_dataset=rows())


def test_layer_maps_and_heads_are_checked_by_tinybert(tmp_path):
    student, teacher = pair()

    def trainer(student=student, **options):
        return TinyBertTrainer(student, config(tmp_path, TinyBertConfig, **options), teacher_model=teacher)

    with pytest.raises(ValueError, match=r"layer map points to hidden state 7 of the teacher, which has 0 .* to 4"):
        trainer(layer_map="2,7")
    with pytest.raises(ValueError, match=r"names 3 teacher layers, but the student has 2 layers"):
        trainer(layer_map="1,2,3")
    with pytest.raises(ValueError, match=r"has 2 heads, layer 2 of the teacher 4"):
        trainer(make_student(teacher, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        TinyBertTrainer(*pair("bart")[:1], config(tmp_path, TinyBertConfig), teacher_model=pair("bart")[1])


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    student, teacher = pair()
    args = config(tmp_path, TinyBertConfig, max_steps=6, save_strategy="steps", save_steps=2)
    trainer = TinyBertTrainer(student, args, teacher_model=teacher, train_dataset=rows())
    save = torch.save

    def full(value, file, *args, **kwargs):
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            Path(file).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.setattr(torch, "save", save)
    student, _ = pair()
    trainer = TinyBertTrainer(student, args, teacher_model=teacher, train_dataset=rows())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert trainer.state.log_history[0]["step"] == 1  # from checkpoint-2, with its log


def test_a_teacher_in_8_or_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    student, teacher = pair(hidden_size=64, intermediate_size=128)  # its 4-bit blocks hold 64 weights
    teacher.save_pretrained(tmp_path / "teacher")
    for bits in (8, 4):
        args = config(tmp_path, teacher_bits=bits)
        trainer = DistillationTrainer(student, args, teacher_model=tmp_path / "teacher", train_dataset=rows())
        assert trainer.teacher.is_quantized
        trainer.train()


def test_decoder_states_count_the_labels_and_encoder_states_the_input(tmp_path):
    """Both sides of an encoder-decoder are equally long and padded unequally; against a loop over tokens."""
    student, teacher = pair("bart")
    data = rows(4, kind="seq2seq")
    data = data.map(lambda r: {"labels": r["labels"][:3] + [-100] * 9})
    args = config(tmp_path, hints="1:2,3:5", per_device_eval_batch_size=4)
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data, eval_dataset=data)
    metrics = trainer.evaluate()
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        mine, theirs = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    real = {"hint_loss": batch["attention_mask"].bool(), "decoder_hint_loss": batch["labels"] != -100}
    states = {
        "hint_loss": (mine.encoder_hidden_states[1], theirs.encoder_hidden_states[2]),
        "decoder_hint_loss": (mine.decoder_hidden_states[1], theirs.decoder_hidden_states[2]),
    }
    for name, (a, b) in states.items():  # of equal widths: no projection
        tokens = [(a[i, t] - b[i, t]).square().mean() for i, t in real[name].nonzero().tolist()]
        assert metrics[f"eval_{name}"] == pytest.approx(torch.stack(tokens).mean().item(), rel=1e-5)
