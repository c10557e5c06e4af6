"""A comparison finds what was put in, and nothing where nothing was."""

import json
import random
import sys

import pytest
import torch
from helpers import tiny_model
from transformers import BertTokenizer

import hf_compress as hfc
from hf_compress.measuring.metrics import accuracy
from hf_compress.measuring.quality import example_scores, padding_collator, unknown_tokens, usable_rows
from hf_compress.report import report as report_module
from hf_compress.report import tables

NUM_LABELS = 3
QUICK = dict(sequence_length=8, latency_rounds=5, throughput_rounds=5)


class FakeClock:
    """A clock that only forwards move: `seconds` for each example, a little more in some rounds than in others."""

    def __init__(self, seconds):
        self.now, self.noise = 0.0, random.Random(0)
        for model, cost in seconds.items():
            model.register_forward_pre_hook(self.advance(cost), with_kwargs=True)

    def advance(self, cost):
        def hook(module, args, kwargs):
            self.now += cost * len(kwargs["input_ids"]) * (1 + 0.05 * self.noise.random())

        return hook

    def __call__(self):
        return self.now


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def classifier(seed=0, **changes):
    return tiny_model("bert", seed=seed, num_labels=NUM_LABELS, **changes)


def examples(model, wrong=(), n=60):
    """Rows of different lengths that `model` gets right, but for the indices in `wrong`."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for i in range(n):
        ids = torch.randint(5, 60, (1, 4 + i % 5), generator=generator)
        with torch.no_grad():
            label = model(input_ids=ids).logits.argmax(-1).item()
        rows.append({"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1], "text": "not for the model",
                     "label": (label + (i in wrong)) % NUM_LABELS})  # fmt: skip
    return rows


def shifted(model, by=1):
    """A copy that answers the next label: wrong wherever `model` is right."""
    copy = classifier()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.classifier.weight.copy_(model.classifier.weight.roll(by, 0))
        copy.classifier.bias.copy_(model.classifier.bias.roll(by, 0))
    return copy


def test_scores_stay_with_their_examples(tokenizer):
    """Rows are run in the order of their length, with padding, and the model may be in training mode."""
    model, wrong = classifier(), {0, 7, 8, 31, 59}
    rows = usable_rows(examples(model, wrong=wrong), model, accuracy)
    collator = padding_collator(rows, tokenizer, model, "input_ids")
    scores = example_scores(model.train(), rows, collator, metric=accuracy, batch_size=7)
    assert {i for i, score in enumerate(scores) if score == 0} == wrong
    assert model.training


def test_a_model_and_itself_do_not_differ(tokenizer):
    model, same = classifier(), classifier()
    report = hfc.compare([("m", model), ("same", same)], eval_dataset=examples(model, wrong=[3]),
                         processing_class=tokenizer, clock=FakeClock({model: 0.01, same: 0.01}), **QUICK)  # fmt: skip
    entry = report["same"]
    assert entry.difference.verdict == "no difference"
    assert entry.difference.p_value == 1.0
    assert entry.latency_speed_up.speed_verdict == entry.throughput_speed_up.speed_verdict == "no difference"
    assert entry.parameter_rate == entry.byte_rate == 1.0
    assert "no difference from m found" in report.table()


def test_an_injected_slow_down_is_found():
    model, slow = classifier(), classifier()
    report = hfc.compare({"m": model, "slow": slow}, clock=FakeClock({model: 0.010, slow: 0.011}), **QUICK)
    entry = report["slow"]
    assert entry.latency_speed_up.speed_verdict == entry.throughput_speed_up.speed_verdict == "worse"
    assert entry.throughput_speed_up.value == pytest.approx(10 / 11, rel=0.02)  # the clock's unevenness
    assert "slower" in report.table()


def test_an_injected_loss_is_found_and_has_its_size(tokenizer):
    model = classifier()
    rows = examples(model)
    report = hfc.compare({"m": model, "bad": shifted(model)}, eval_dataset=rows, processing_class=tokenizer, **QUICK)
    difference = report["bad"].difference
    assert difference.interval.value == -1.0
    assert difference.test == "McNemar, exact"
    assert difference.p_value == pytest.approx(2 / 2**60)
    assert difference.verdict == "worse"


def test_seeds_give_mean_and_spread(tokenizer):
    model = classifier()
    report = hfc.compare({"m": model, "seeds": [model, shifted(model), model]}, eval_dataset=examples(model),
                         processing_class=tokenizer, **QUICK)  # fmt: skip
    entry = report["seeds"]
    assert entry.seed_qualities == (1.0, 0.0, 1.0)
    assert entry.quality == pytest.approx(2 / 3)
    assert entry.quality_spread == pytest.approx((1 / 3) ** 0.5)  # squares 1/9 + 4/9 + 1/9, over 2
    assert entry.difference.test == "paired permutation"
    assert "66.7 ± 57.7%" in report.table()


def test_rates_are_those_of_the_sizes():
    model, small = classifier(), classifier(num_hidden_layers=2)
    entry = hfc.compare({"m": model, "small": small}, **QUICK)["small"]
    assert entry.parameter_rate == model.num_parameters() / small.num_parameters()
    assert 1.5 < entry.byte_rate < 2
    shape = {"layers": 2, "hidden_size": 32, "heads": [4, 4], "neurons": [48, 48]}
    assert entry.structure == {**shape, "tokens": 64, "embedding_bits": 32}
    assert entry.quality is None and entry.difference is None


def test_the_theoretical_speed_up_is_that_of_the_multiply_adds():
    """BERT by hand, 8 tokens: each layer 4 D^2 + 2 D F a token and 2 T D for attention; pooler and head one token's."""
    model = classifier()
    half = hfc.prune_neurons(classifier(), {i: range(32) for i in range(4)})
    masked = classifier()
    masked.bert.encoder.layer[0].output.dense.weight.data.zero_()
    report = hfc.compare({"m": model, "half": half, "masked": masked}, **QUICK)
    D, F, T, L = 32, 48, 8, 4

    def count(neurons):
        return L * (T * (4 * D * D + 2 * D * neurons) + 2 * T * T * D) + D * D + D * NUM_LABELS

    assert report["m"].measurement.multiply_adds == count(F)
    assert report.multiply_add_rate(report["half"]) == pytest.approx(count(F) / count(F - 32), rel=1e-12)
    assert report.multiply_add_rate(report["m"]) == report.multiply_add_rate(report["masked"]) == 1.0
    rate = f"({count(F) / count(F - 32):.2f}x)"
    assert rate in report.to_markdown() and "multiply_add_rate" in report.to_csv()


def test_a_masked_model_is_not_called_smaller():
    model, masked = classifier(), classifier()
    with torch.no_grad():
        for layer in masked.bert.encoder.layer:
            layer.intermediate.dense.weight[:24] = 0.0
    report = hfc.compare({"m": model, "masked": masked}, **QUICK)
    entry = report["masked"]
    assert entry.parameter_rate == entry.byte_rate == 1.0
    assert entry.measurement.sparsity["rows"] == pytest.approx(24 / (48 + 5 * 32), abs=0.01)
    assert any(note.startswith("masked: ") and "not smaller" in note for note in report.notes)
    assert not any(note.startswith("m: ") for note in report.notes)


def test_the_reference_may_be_another_than_the_first():
    model, small = classifier(), classifier(num_hidden_layers=2)
    report = hfc.compare({"small": small, "m": model}, reference="m", **QUICK)
    assert report.reference == "m"
    assert report["small"].parameter_rate > 1 == report["m"].parameter_rate


def test_folders_name_themselves_and_bring_their_tokenizer(tmp_path, tokenizer):
    model = classifier()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    report = hfc.compare([tmp_path / "one", str(tmp_path / "two")], eval_dataset=examples(model), device="cpu", **QUICK)
    assert [entry.name for entry in report.entries] == ["one", "two"]
    assert report["two"].quality == 1.0


def test_a_metric_may_be_any_score_of_an_example(tokenizer):
    model = classifier()

    def confidence(outputs, batch):
        return outputs.logits.softmax(-1).gather(1, batch["labels"][:, None])[:, 0]

    report = hfc.compare({"m": model}, eval_dataset=examples(model), processing_class=tokenizer, metric=confidence,
                         **QUICK)  # fmt: skip
    assert report.metric == "confidence"
    assert 1 / NUM_LABELS < report["m"].quality < 1.0


def test_what_was_saved_can_be_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/home/someone/compare.py", "--model", "/srv/models/teacher", "--token", "hf_abc"]
    )
    model = classifier()
    report = hfc.compare({"m": model, "n": classifier(seed=1)}, eval_dataset=examples(model),
                         processing_class=tokenizer, dataset_name="made-up", **QUICK)  # fmt: skip
    report.save(tmp_path / "new" / "report")
    files = {file.name for file in (tmp_path / "new" / "report").iterdir() if not file.name.startswith(".")}
    assert files == {f"report.{kind}" for kind in ("csv", "html", "json", "md", "png")}
    record = json.loads((tmp_path / "new" / "report" / "report.json").read_text(encoding="utf-8"))
    assert record["command"] == "python compare.py --model teacher --token ***"
    assert record["entries"][0]["quality"] == 1.0
    assert record["entries"][1]["difference"]["verdict"] in ("worse", "no difference")
    assert len(record["entries"][0]["measurement"]["latency_ms"]["samples"]) == QUICK["latency_rounds"]
    text = (tmp_path / "new" / "report" / "report.md").read_text(encoding="utf-8")
    for part in ("| m |", "1 thread" if torch.get_num_threads() == 1 else "threads", "float32", "torch 2", "made-up"):
        assert part in text


def test_a_save_that_fails_leaves_the_last_report_whole(tmp_path, monkeypatch):
    report = hfc.compare({"m": classifier()}, **QUICK)
    report.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        hfc.compare({"other": classifier(num_hidden_layers=1)}, **QUICK).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class TestErrors:
    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match="at least one model"):
            hfc.compare({})
        with pytest.raises(ValueError, match="'m' holds no model"):
            hfc.compare({"m": []})

    def test_models_need_names_of_their_own(self):
        with pytest.raises(TypeError, match="pair \\(name, model\\), got BertForSequenceClassification"):
            hfc.compare([classifier()])
        with pytest.raises(ValueError, match="two models are called 'm'"):
            hfc.compare([("m", classifier()), ("m", classifier())])

    def test_unknown_reference(self):
        with pytest.raises(ValueError, match="one of the models, \\['m'\\], got 'teacher'"):
            hfc.compare({"m": classifier()}, reference="teacher")

    def test_data_that_cannot_be_scored(self, tokenizer):
        model = classifier()
        with pytest.raises(ValueError, match="eval_dataset is empty"):
            hfc.compare({"m": model}, eval_dataset=[])
        with pytest.raises(ValueError, match="no column 'input_ids', only \\['label', 'text'\\]. Tokenize"):
            hfc.compare({"m": model}, eval_dataset=[{"text": "a", "label": 1}])
        with pytest.raises(ValueError, match="accuracy needs labels"):
            hfc.compare({"m": model}, eval_dataset=[{"input_ids": [5, 6]}], processing_class=tokenizer)
        with pytest.raises(ValueError, match="as `processing_class`"):
            hfc.compare({"m": model}, eval_dataset=examples(model))

    def test_models_of_different_tasks(self, tokenizer):
        model, other = classifier(), tiny_model("bert", num_labels=2)
        with pytest.raises(ValueError, match="do not have the same labels"):
            hfc.compare({"m": model, "o": other}, eval_dataset=examples(model), processing_class=tokenizer)
        model.config.id2label, other = {0: "a", 1: "b", 2: "c"}, classifier()
        other.config.id2label = {0: "b", 1: "a", 2: "c"}
        with pytest.raises(ValueError, match="do not have the same labels"):
            hfc.compare({"m": model, "o": other}, eval_dataset=examples(model), processing_class=tokenizer)

    def test_accuracy_of_what_is_no_label(self):
        outputs = type("Outputs", (), {"logits": torch.zeros(2, 3)})
        with pytest.raises(ValueError, match="Give a `metric`"):
            accuracy(outputs, {"labels": torch.tensor([0.5, 1.0])})

    def test_a_metric_that_returns_a_mean(self, tokenizer):
        model = classifier()
        with pytest.raises(ValueError, match=r"one score for each example, \(32,\) here, got \(\)"):
            hfc.compare({"m": model}, eval_dataset=examples(model), processing_class=tokenizer,
                        metric=lambda outputs, batch: outputs.logits.mean())  # fmt: skip

    def test_no_quality_to_plot(self):
        with pytest.raises(ValueError, match="give `compare` an eval_dataset"):
            report_module.trade_off_png(hfc.compare({"m": classifier()}, **QUICK))


def test_models_of_two_dtypes_are_told_apart(tmp_path):
    models = {"full": classifier(), "half": classifier().to(torch.bfloat16), "other": classifier(seed=1)}
    report = hfc.compare(models, **QUICK)
    assert "float32: full, other; bfloat16: half" in report.to_markdown()


def test_tokens_that_a_tokenizer_does_not_know_are_told_everywhere(tokenizer):
    """[CLS], [SEP] and [PAD] are no tokens of a text: 2 of the 3 + 5 that are left are [UNK]."""
    model, small = classifier(), classifier(num_hidden_layers=2)
    known = [{"input_ids": [2, 7, 8, 9, 3], "label": 0}, {"input_ids": [2, 7, 8, 9, 10, 3], "label": 1}]
    cut = [{"input_ids": [2, 7, 8, 1, 3], "label": 0}, {"input_ids": [2, 7, 1, 9, 10, 11, 3, 0], "label": 1}]
    report = hfc.compare({"m": model, "cut": small}, eval_dataset={"m": known, "cut": cut}, processing_class=tokenizer,
                         **QUICK)  # fmt: skip
    assert (report["m"].unknown_tokens, report["m"].num_tokens) == (0, 7)
    assert (report["cut"].unknown_tokens, report["cut"].num_tokens) == (2, 8)
    told = "Tokens of these texts that a model does not know: m 0 of 7 (0.00%); cut 2 of 8 (25.00%)."
    assert told in report.table() and told in report.to_markdown() and told in report.to_html()
    assert json.loads(report.to_json())["entries"][1]["unknown_tokens"] == 2
    assert report_module.Report.from_json(report.to_json()) == report
    line = report.to_csv().splitlines()[2].split(",")
    assert (line[report.to_csv().splitlines()[0].split(",").index("unknown_tokens")]) == "2"
    same = hfc.compare({"m": model, "again": model}, eval_dataset=known, processing_class=tokenizer, **QUICK)
    assert same["again"].num_tokens == 7 and not same.notes, "nothing was lost: nothing to say"
    gpt = BertTokenizer(vocab=tokenizer.get_vocab(), unk_token="[SEP]")
    assert unknown_tokens(known, gpt) is None, "a token that ends texts as well is no sign of unknown words"


@pytest.mark.parametrize("columns", [300, 60, 10])
def test_a_narrow_terminal_gets_a_column_for_each_model(columns, monkeypatch):
    """As wide as it is, where it is wide, or too narrow for either way; in a file always a line for each model."""
    rows = [["model", "accuracy", "parameters", "latency, batch 1", "throughput, batch 32"],
            ["a", "0.81", "22.7 M", "12.9 ms", "180/s"], ["b", "0.8", "6.3 M (3.6x)", "1.9 ms", "1,792/s"]]  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(columns))
    assert tables.fitted(rows) == tables.aligned(rows)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = tables.fitted(rows)
    assert len(lines) == (6 if columns == 60 else 4)
    if columns == 60:
        assert lines[0].split() == ["model", "a", "b"] and max(map(len, lines)) <= 60
        assert lines[3].split("  ")[0] == "parameters" and lines[3].endswith("6.3 M (3.6x)")
