"""A card says what was measured, and nothing about the machine that nobody asked to publish."""

import dataclasses
import re
import socket

import pytest
from helpers import tiny_model
from transformers import BertTokenizer

import hf_compress as hfc
from hf_compress.report.card import Stage, auto_class, structure_sentences
from hf_compress.report.tables import rate_word

QUICK = dict(sequence_length=8, latency_rounds=2, throughput_rounds=2)
TOKEN = "hf_" + "abcdefghij" * 3
COMMAND = "python x.py --hub_token ***"


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sentence", "to", "try", "it", "with", "."]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


@pytest.fixture(scope="module")
def student():
    return tiny_model("bert", num_labels=2, num_hidden_layers=2)


@pytest.fixture(scope="module")
def report(student, tokenizer):
    teacher = tiny_model("bert", num_labels=2)
    rows = [{"input_ids": [5 + i % 7, 6, 7], "attention_mask": [1, 1, 1], "label": i % 2} for i in range(20)]
    return hfc.compare({"teacher": teacher, "student": student}, eval_dataset=rows, processing_class=tokenizer,
                       dataset_name="Made-up News", command=COMMAND, **QUICK)  # fmt: skip


@pytest.fixture
def card(report, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a card asks nothing of the network")

    monkeypatch.setattr(socket, "socket", no_network)
    stages = [Stage("TinyBERT distillation", {"temperature": 1.0, "train_file": "train.csv"}, "Jiao, 2020")]
    return hfc.model_card(report, model="student", repo_id="me/small-bert", base_model="google-bert/bert-base-uncased",
                          teacher="google-bert/bert-base-uncased", dataset_id="made-up-news", dataset_split="test",
                          stages=stages, tags=["distilled"], language="en", license="apache-2.0",
                          limits=["English only."], labels=["neg", "po|s"])  # fmt: skip


def test_the_head_is_what_the_hub_reads(card, report):
    data = card.data
    assert data.library_name == "transformers"
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.base_model_relation == "finetune"
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["hf_compress", "distilled"]
    assert (data.license, data.language, data.datasets, data.metrics) == (
        "apache-2.0", "en", ["made-up-news"], ["accuracy"]
    )  # fmt: skip
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name, result.dataset_split) == (
        "text-classification", "made-up-news", "Made-up News", "test"
    )  # fmt: skip
    assert (result.metric_type, result.metric_value) == ("accuracy", report["student"].quality)


def test_the_body_says_what_was_measured(card, report):
    entry = report["student"]
    for part in (
        "# small-bert",
        f"**{rate_word(entry.byte_rate, 'smaller', 'larger').capitalize()}, ",
        ", 20 examples**, beside teacher on Made-up News.",
        "It tells apart: `neg`, `po|s`.",
        f"{entry.measurement.latency_ms.median:.2f} ms",
        "2 layers of hidden size 32",
        "4 heads a layer",
        "1. TinyBERT distillation (`temperature=1.0`",
        "Jiao, 2020",
        "English only.",
        "20 examples of Made-up News",
        entry.measurement.device,
        f"torch {entry.measurement.versions['torch']}",
        "python x.py --hub_token ***",
    ):
        assert part in card.text, part


@pytest.mark.parametrize("private", [TOKEN, "/home/my folder/train.csv", "ask me@example.org"])
def test_what_should_stay_private_is_refused_with_its_line(report, private):
    stages = [Stage("TinyBERT distillation", {"train_file": private})]
    with pytest.raises(ValueError, match="The card would tell what should stay private: line [0-9]+: '"):
        hfc.model_card(report, model="student", repo_id="me/small", stages=stages)
    allow = [TOKEN, "/home/my", "me@example.org"]
    assert private in hfc.model_card(report, model="student", repo_id="me/small", stages=stages, allow=allow).content


def test_the_snippet_works_when_pasted(card, student, tokenizer, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path / "me" / "small-bert")
    tokenizer.save_pretrained(tmp_path / "me" / "small-bert")
    monkeypatch.chdir(tmp_path)  # the name on the Hub is a folder here
    (snippet,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    assert "import hf_compress" not in snippet
    names = {}
    exec(snippet, names)
    assert names["outputs"].logits.shape == (1, 2)
    assert type(names["model"]) is type(student)


def test_a_model_that_needs_the_plugin_says_so(report):
    student = dataclasses.replace(report["student"], needs_plugin=True)
    report = dataclasses.replace(report, entries=(report["teacher"], student))
    card = hfc.model_card(report, model="student", repo_id="me/small")
    assert "```python\nimport hf_compress" in card.content


def test_few_bits_make_a_quantized_model(report):
    cost = dataclasses.replace(report["student"].measurement, bits_per_weight=4.25)
    student = dataclasses.replace(report["student"], measurement=cost)
    report = dataclasses.replace(report, entries=(report["teacher"], student))
    card = hfc.model_card(report, model="student", repo_id="me/small", base_model="me/big")
    assert card.data.base_model_relation == "quantized"
    assert "4.25 stored bits a weight" in card.content
    assert card.data.eval_results is None  # no dataset_id was given


def test_widths_that_differ_are_listed(report):
    structure = {"layers": 2, "hidden_size": 32, "heads": [4, 1], "neurons": [48, 48]}
    assert structure_sentences(dataclasses.replace(report["student"], structure=structure)) == [
        "2 layers of hidden size 32", "heads by layer: [4, 1]", "48 neurons a layer"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("GPT2LMHeadModel", "GPT2LMHeadModel"),
        ("BartForConditionalGeneration", "BartForConditionalGeneration"),
    ],
)
def test_the_class_that_loads_it(architecture, expected):
    assert auto_class(architecture) == expected


class TestErrors:
    @pytest.mark.parametrize("name", ["/home/me/bert", "./bert", "a/b/c", "~/bert"])
    def test_a_base_model_is_a_name_on_the_hub(self, report, name):
        with pytest.raises(ValueError, match="base_model must be a name on the Hub"):
            hfc.model_card(report, model="student", repo_id="me/small", base_model=name)

    def test_a_teacher_is_a_name_on_the_hub_or_in_the_report(self, report):
        assert "taught by teacher" in hfc.model_card(report, model="student", repo_id="me/s", teacher="teacher").text
        with pytest.raises(ValueError, match="teacher must be a name on the Hub"):
            hfc.model_card(report, model="student", repo_id="me/s", teacher="../runs/teacher")

    def test_a_folder_that_looks_like_a_name(self, report, tmp_path, monkeypatch):
        (tmp_path / "runs" / "teacher").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="got 'runs/teacher'"):
            hfc.model_card(report, model="student", repo_id="me/small", base_model="runs/teacher")

    def test_a_model_that_is_not_in_the_report(self, report):
        with pytest.raises(KeyError, match="no model 'other'"):
            hfc.model_card(report, model="other", repo_id="me/small")
