"""Embedders: the losses, a run without labels, and a folder that sentence-transformers opens."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model
from recipe_run import tiny_folder
from transformers import AutoModel, AutoTokenizer

import hf_compress as hfc
from distillation.data import rows
from distillation.training import random, trainer_of
from hf_compress.distillation.methods.embeddings import similarity_loss, vector_distance
from hf_compress.model.pooling import Pooling, read_pooling, write_pooling

trainer = partial(trainer_of, hfc.EmbeddingDistillationTrainer)


def embedders(width=16, **changes):
    teacher = tiny_model("bert", seed=3, initializer_range=0.3, **changes).bert
    return hfc.make_student(teacher, num_hidden_layers=2, hidden_size=width), teacher


def texts(n=8):
    return rows(n).remove_columns("labels")


def cosine(a, b):
    dot, lengths = sum(x * y for x, y in zip(a, b, strict=True)), [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    return dot / (lengths[0] * lengths[1])


def test_the_distances_are_their_equations():
    mine, theirs = random(3, 4), random(3, 4, seed=1)
    expected = sum(1 - cosine(a, b) for a, b in zip(mine.tolist(), theirs.tolist(), strict=True))
    assert vector_distance(mine, theirs, "cosine").item() == pytest.approx(expected, rel=1e-12)
    squares = sum((a - b) ** 2 / 4 for a, b in zip(mine.flatten().tolist(), theirs.flatten().tolist(), strict=True))
    assert vector_distance(mine, theirs, "mse").item() == pytest.approx(squares, rel=1e-12)


@pytest.mark.parametrize("queued", [0, 2])
def test_the_similarity_loss_is_its_equation(queued):
    mine, theirs, tau = random(3, 4), random(3, 6, seed=1), 0.5  # widths may differ
    others = (random(queued, 4, seed=2), random(queued, 6, seed=3)) if queued else None
    expected = 0.0
    for i in range(3):
        logs = []
        for k, vectors in enumerate((mine, theirs)):
            keys = [v for j, v in enumerate(vectors.tolist()) if j != i] + (others[k].tolist() if queued else [])
            scores = [cosine(vectors[i].tolist(), key) / tau for key in keys]
            total = math.log(sum(math.exp(s) for s in scores))
            logs.append([s - total for s in scores])
        expected += sum(math.exp(t) * (t - s) for s, t in zip(*logs, strict=True))
    assert similarity_loss(mine, theirs, tau, others).item() == pytest.approx(expected, rel=1e-9)
    mine.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: similarity_loss(x, theirs, tau, others), mine)


def test_a_text_alone_has_no_others_and_a_student_like_its_teacher_no_loss():
    one = random(1, 4).requires_grad_()
    assert similarity_loss(one, random(1, 4), 0.1).item() == 0.0
    x = random(4, 5)
    assert similarity_loss(x, 3 * x, 0.1).item() == pytest.approx(0.0, abs=1e-12)
    assert vector_distance(x, 3 * x, "cosine").item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_run_computes_the_equation_whatever_the_padding(mode, tmp_path):
    student, teacher = embedders(width=32)  # the teacher's: nothing is projected
    data = texts(4)
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        vectors = [Pooling(mode)(m.eval()(**inputs)[0], inputs["attention_mask"]) for m in (student, teacher)]
    found = trainer(tmp_path, student, teacher, data, pooling=mode, similarity_weight=2.0).evaluate()
    distance, similar = vector_distance(*vectors, "cosine") / 4, similarity_loss(*vectors, 0.05) / 4
    assert found["eval_vector_loss"] == pytest.approx(distance.item(), rel=1e-4)
    assert found["eval_similarity_loss"] == pytest.approx(similar.item(), rel=1e-3)
    assert found["eval_loss"] == pytest.approx(found["eval_vector_loss"] + 2 * found["eval_similarity_loss"], rel=1e-5)


def test_the_queue_holds_the_texts_before(tmp_path):
    student, teacher = embedders()
    data, size = texts(8), 6
    run = trainer(tmp_path, student, teacher, data, queue_size=size, max_steps=2, learning_rate=0.0)
    run.train()
    seen = run.training_state.teacher_queue
    assert int(run.training_state.queued) == 8
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        vectors = Pooling()(teacher(**inputs)[0], inputs["attention_mask"])
    nearest = torch.cdist(seen, vectors).min(dim=1)
    assert nearest.values.max() < 1e-4 and len(nearest.indices.unique()) == size  # each its own text


def test_the_folder_opens_in_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    student, teacher = embedders()
    run = trainer(tmp_path / "run", student, teacher, texts(), learning_rate=1e-2)
    run.train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder(tmp_path / "other"))
    run.save_model(str(tmp_path / "saved"))
    tokenizer.save_pretrained(tmp_path / "saved")
    told = ["a fine film", "dull"]
    found = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(told, convert_to_tensor=True)
    again = AutoModel.from_pretrained(tmp_path / "saved")
    inputs = tokenizer(told, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = Pooling()(again(**inputs)[0], inputs["attention_mask"])
        expected = F.normalize(run.training_state.sentence(vectors), dim=-1)
    assert found.shape == (2, 32)  # the teacher's width
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_pooling_is_that_of_the_teachers_folder(tmp_path):
    student, teacher = embedders(width=32)
    teacher.save_pretrained(tmp_path / "teacher")
    write_pooling(tmp_path / "teacher", Pooling("cls", normalize=False), 32)
    run = trainer(tmp_path / "run", student, str(tmp_path / "teacher"), texts())
    run.save_model(str(tmp_path / "saved"))
    assert read_pooling(tmp_path / "saved") == Pooling("cls", normalize=False)


def test_bad_input_is_refused_before_training(tmp_path):
    kind = partial(hfc.EmbeddingDistillationConfig, str(tmp_path))
    with pytest.raises(ValueError, match="pooling must be `auto` or one of"):
        kind(pooling="sum")
    with pytest.raises(ValueError, match="one of them above 0"):
        kind(vector_weight=0.0, similarity_weight=0.0)
    with pytest.raises(ValueError, match="similarity_temperature above 0"):
        kind(similarity_temperature=0.0)
