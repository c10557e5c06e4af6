"""Embedders on the command line: distilled from texts alone, packed, compared with their teacher, opened elsewhere."""

import json
import math

import pytest
import torch
import yaml
from recipe_run import QUICK, TRAIN, embedder
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from hf_compress.commands.main import main
from hf_compress.measuring.measure import load_model
from hf_compress.model.pooling import Pooling, read_vectors
from hf_compress.recipe.data import DataOptions
from hf_compress.recipe.tasks.table import task_of
from hf_compress.report.vectors import agreement, text_vectors

LETTERS = "abcdefghij"
TEXTS = [f"the film was {'good' if i % 2 else 'bad'} {LETTERS[i % 10]} {LETTERS[i // 10]}" for i in range(60)]


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    return file


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value).lower())]


def vectors(folder, some=("the film was good", "bad a")):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [dict(tokenizer(text)) for text in some]
    return text_vectors(
        AutoModel.from_pretrained(folder), folder, rows, lambda r: tokenizer.pad(r, return_tensors="pt")
    )


def ranks(values):
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def correlation(a, b):
    a, b = ([x - sum(v) / len(v) for x in v] for v in (a, b))
    return sum(map(lambda x, y: x * y, a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("n, k", [(5, 4), (14, 10)])
def test_agreement_is_rank_correlation_and_recall(n, k):
    chance = torch.Generator().manual_seed(0)
    mine, theirs = (torch.nn.functional.normalize(torch.randn(n, d, generator=chance), dim=-1) for d in (4, 6))
    found = agreement(mine, theirs)
    for i in range(n):
        pairs = [[float(x[i].double() @ x[j].double()) for j in range(n) if j != i] for x in (mine, theirs)]
        near = [set(sorted(range(n - 1), key=lambda j, own=own: -own[j])[:k]) for own in pairs]
        assert found[i, 0].item() == pytest.approx(correlation(*map(ranks, pairs)), abs=1e-9)
        assert found[i, 1].item() == pytest.approx(len(near[0] & near[1]) / k)
    same = agreement(theirs, theirs)
    torch.testing.assert_close(same, torch.ones(n, 2, dtype=torch.double))
    with pytest.raises(ValueError, match="on 3 to 4000 texts, got 2"):
        agreement(mine[:2], theirs[:2])


FAMILIES = [("bert", Pooling("cls", normalize=False)), ("mpnet", Pooling("mean")), ("distilbert", None)]


@pytest.mark.parametrize("family, pooling", FAMILIES, ids=[name for name, _ in FAMILIES])
def test_one_command_distils_an_embedder(family, pooling, texts, tmp_path, capsys):
    teacher = embedder(tmp_path, family, pooling)
    command = ["distil", "--task", "embeddings", "--model", str(teacher), "--data", str(texts), "--num_hidden_layers",
               "1/2", "--max_length", "16", "--output", str(tmp_path / "out"), *words(TRAIN)]  # fmt: skip
    command += ["--evaluate"] * (family == "mpnet")  # half of the time
    assert main(command) == 0, capsys.readouterr().err
    student = tmp_path / "out" / "model"
    assert AutoModel.from_pretrained(student).config.num_hidden_layers == 2
    assert read_vectors(student) == (pooling or Pooling(), None)
    if family != "mpnet":
        return
    assert "rank correlation of cosines" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    first, second = report["entries"]
    assert first["seed_qualities"][0] == pytest.approx(1.0) and second["seed_qualities"][0] < 1
    assert set(second["scores"]) == {"recall@10"}


def test_what_is_made_of_an_embedder_opens_in_sentence_transformers(texts, tmp_path, capsys):
    """A narrower student has a map behind its pooling, and packing keeps both."""
    library = pytest.importorskip("sentence_transformers")
    teacher = embedder(tmp_path, pooling=Pooling("mean"))
    stages = [{"distil": {"method": "embeddings", "hidden_size": 16, "num_hidden_layers": 1, **TRAIN}},
              {"prune": {"method": "vocabulary"}}, {"quantize": {"bits": 8}},
              {"evaluate": {**QUICK, "models": "input,distil"}}]  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"task": "embeddings", "stages": stages}), encoding="utf-8")
    command = ["run", str(tmp_path / "mine.yaml"), "--model", str(teacher), "--data", str(texts), "--max-length", "16",
               "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    some = ["the film was good", "bad a"]
    found = library.SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu").encode(some)
    assert found.shape == (2, 32), "of the teacher's width"
    expected = vectors(tmp_path / "out" / "model", some).float()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_cut_embedder_keeps_its_pooling(tmp_path, texts, capsys):
    teacher = embedder(tmp_path, pooling=Pooling("cls"))
    command = ["prune", "--method", "structure", "--layers", "0.5", "--model", str(teacher), "--data", str(texts),
               "--output", str(tmp_path / "out"), "--max_length", "16", "--task", "embeddings"]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    assert read_vectors(tmp_path / "out" / "model")[0] == Pooling("cls")
    compared = ["compare", str(teacher), f"cut={tmp_path / 'out'}", "--task", "embeddings", "--data", str(texts),
                "--output", str(tmp_path / "report"), "--max_length", "16", *words(QUICK)]  # fmt: skip
    assert main(compared) == 0, capsys.readouterr().err


def test_the_task_is_told_by_the_folder_and_the_data(texts, tmp_path):
    teacher = embedder(tmp_path, pooling=Pooling())
    assert task_of(teacher, DataOptions(str(texts))) == "embeddings"
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(TEXTS)), encoding="utf-8")
    assert task_of(teacher, DataOptions(str(rows))) == "sequence-classification"


MISTAKES = [
    ({"fine-tune": TRAIN}, "there is nothing to fine-tune on for embeddings"),
    ({"distil": {**TRAIN, "num_hidden_layers": 1}}, "a model without a head: it has no logits"),
    ({"prune": {"method": "structure", "heads": 0.5}}, "Importance by gradient needs a loss"),
]


@pytest.mark.parametrize("stage, message", MISTAKES, ids=["fine-tune", "soft-targets", "heads"])
def test_what_embedders_cannot_do_is_said(stage, message, texts, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": [stage]}), encoding="utf-8")
    command = ["run", str(tmp_path / "mine.yaml"), "--model", str(embedder(tmp_path)), "--data", str(texts), "--task",
               "embeddings", "--max-length", "16", "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("pooling, expected", [("models.Pooling", "BertModel"), (
    "sparse_encoder.models.SpladePooling", "BertForMaskedLM")])  # fmt: skip
def test_the_head_that_a_config_names_is_opened_where_it_is_read(pooling, expected, texts, tmp_path, capsys):
    """all-mpnet-base-v2's names MPNetForMaskedLM, and its file has no such head; a sparse encoder's has it."""
    folder = embedder(tmp_path, pooling=Pooling("mean"))
    if expected == "BertForMaskedLM":
        AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}), encoding="utf-8")
    steps = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    steps[1]["type"] = f"sentence_transformers.{pooling}"
    (folder / "modules.json").write_text(json.dumps(steps), encoding="utf-8")
    assert type(load_model(folder)).__name__ == expected
    if expected == "BertModel":
        command = ["compare", f"one={folder}", f"two={folder}", "--data", str(texts), "--task", "embeddings"]
        quick = words({**QUICK, "max-length": 16, "output": tmp_path / "report"})
        assert main([*command, *quick]) == 0, capsys.readouterr().err
