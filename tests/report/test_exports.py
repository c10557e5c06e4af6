"""Exported folders are models of a comparison: the same texts, the same threads, a runtime of their own."""

import json
import shutil
import sys

import pytest
import torch
from helpers import tiny_batch, tiny_model
from recipe_run import QUICK, REVIEW_LABELS, reviews
from runtime_models import ROWS, tiny_tokenizer, with_spread

import hf_compress as hfc
from hf_compress.commands.main import main
from hf_compress.formats.runtimes.opened import runner
from hf_compress.measuring.measure import load_model
from hf_compress.report.layers import layer_facts
from hf_compress.report.report import Report

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

HOW = dict(sequence_length=8, latency_rounds=2, throughput_rounds=2)
NAMES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}


@pytest.fixture(scope="module")
def packed():
    """Layers of unequal width, in 8 bit, so that nothing can be told by the config alone."""
    model = with_spread(tiny_model("bert", num_hidden_layers=2, intermediate_size=64, **REVIEW_LABELS))
    hfc.prune_neurons(model, {1: list(range(32))})
    return hfc.quantize(model, embedding_bits=8, **ROWS)


@pytest.fixture(scope="module")
def folders(packed, tmp_path_factory):
    place = tmp_path_factory.mktemp("exports")
    packed.save_pretrained(place / "packed")
    tiny_tokenizer().save_pretrained(place / "packed")
    for format in NAMES:
        hfc.export(packed, place / format, format=format, tokenizer=tiny_tokenizer())
    reviews(place / "reviews.csv")
    return place


def rows(model, n=40):
    """Texts of which the model is sure, so that rounding changes no answer; a fourth have another label."""
    found = []
    for seed in range(4 * n):
        batch = tiny_batch(model, batch=1, length=6 + seed % 3, padding=False, seed=seed)
        logits = model(**batch).logits[0]
        if (logits[0] - logits[1]).abs() > 0.3 * logits.abs().max() and len(found) < n:
            label = int(logits.argmax()) ^ (len(found) % 4 == 0)
            found.append({name: value[0].tolist() for name, value in batch.items()} | {"label": label})
    return found


@pytest.fixture(scope="module")
def report(packed, folders):
    models = {"packed": packed, **{name: folders / name for name in NAMES}}  # one in memory, two in folders
    return hfc.compare(models, eval_dataset=rows(packed), processing_class=tiny_tokenizer(), **HOW)


def test_exports_stand_beside_the_model_they_were_written_from(packed, folders, report):
    reference = report["packed"]
    for format, name in NAMES.items():
        entry, cost = report[format], report[format].measurement
        assert cost.runtime.startswith(f"{name} 2" if format == "openvino" else f"{name} 1.")
        assert entry.quality == reference.quality == 0.75
        assert entry.difference.p_value == 1 and entry.architecture == "BertForSequenceClassification"
        assert (entry.structure, entry.layers) == (reference.structure, layer_facts(packed))
        assert entry.structure["neurons"] == [64, 32]
        assert (cost.parameters, cost.multiply_adds, cost.threads, cost.device) == (
            reference.measurement.parameters, reference.measurement.multiply_adds, torch.get_num_threads(),
            reference.measurement.device)  # fmt: skip
        needed = [path for path in (folders / format).iterdir() if "model." in path.name]
        assert len(needed) == 2
        assert cost.stored_bytes == sum(p.stat().st_size for p in [*needed, folders / format / "config.json"])
        assert len(cost.latency_ms.samples) == 2 and cost.latency_ms.low > 0
        assert cost.peak_memory_bytes is None and cost.sparsity == {}
        assert f"| {format} | {cost.runtime} |" in report.to_markdown()
        assert f"<td>{cost.runtime}</td>" in report.to_html()
        assert f",{cost.runtime}," in report.to_csv()
    assert "| packed | PyTorch |" in report.to_markdown()
    assert Report.from_json(report.to_json()).entries == report.entries


def test_without_an_export_there_is_no_column_for_runtimes(packed):
    assert "| runtime |" not in hfc.compare({"packed": packed}, **HOW).to_markdown()


def test_an_export_is_measured_alone_on_real_examples(folders):
    inputs = {"input_ids": torch.full((2, 5), 7), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    cost = hfc.measure(folders / "onnx", inputs=inputs, latency_rounds=2, throughput_rounds=2)
    assert cost.runtime.startswith("ONNX Runtime") and cost.sequence_length == 5


@pytest.mark.parametrize("format", NAMES)
def test_the_runtime_has_as_many_threads_as_pytorch(format, folders, monkeypatch):
    module, asked = runner(folders / format), []
    monkeypatch.setattr(module, "open_folder", lambda folder, threads: asked.append(threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    load_model(folders / format)
    assert asked == [3]


@pytest.mark.parametrize("format", NAMES)
def test_the_forward_takes_what_the_models_own_takes(format, packed, folders):
    model, batch = load_model(folders / format), tiny_batch(packed)
    found = model(**batch, labels=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found.logits, packed(**batch).logits, atol=0.05, rtol=0.05)  # inputs rounded elsewhere
    assert found.keys() == {"logits"}


@pytest.mark.long
def test_the_command_compares_exports_on_texts(folders, tmp_path, capsys):
    options = [f"--{name}={str(value).lower()}" for name, value in QUICK.items() if name != "isolate"]
    command = ["compare", *(str(folders / name) for name in ("packed", "onnx")), "--data",
               str(folders / "reviews.csv"), "--max-length", "16", "--output", str(tmp_path / "out"),
               *options]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    assert "ONNX Runtime" in capsys.readouterr().out
    report = Report.from_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["onnx"].quality == report["packed"].quality is not None
    assert "packed" in json.dumps(report["onnx"].measurement.routes) or report["onnx"].measurement.routes == {}
    assert main([*command, "--tasks", "piqa"]) == 2
    assert "leave out onnx, an exported folder" in capsys.readouterr().err


def test_a_missing_runtime_names_the_extra(folders, monkeypatch):
    for package, format in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"hf_compress.formats.runtimes.{format}_session", raising=False)
        for ask in (hfc.measure, load_model, lambda folder: hfc.compare([folder])):
            with pytest.raises(ImportError, match=rf"pip install 'hf_compress\[{format}\]'"):
                ask(folders / format)


def test_what_is_neither_model_nor_export_is_said_in_a_sentence(folders, tmp_path):
    for name in ("empty", "config", "gguf", "graph", "damaged"):
        (tmp_path / name).mkdir()
    for name in ("config", "graph"):
        shutil.copy(folders / "onnx" / "config.json", tmp_path / name)
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    shutil.copy(folders / "onnx" / "model.onnx", tmp_path / "graph")
    for file in ("config.json", "export.json", "hf_compress.json"):
        shutil.copy(folders / "onnx" / file, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.onnx").write_bytes(b"half")
    said = {"empty": "no config.json in it", "config": "neither safetensors nor the graph of an export",
            "gguf": "for llama.cpp", "graph": "no export.json", "damaged": "ONNX Runtime refuses"}  # fmt: skip
    for name, sentence in said.items():
        with pytest.raises(ValueError, match=sentence) as error:
            hfc.compare([tmp_path / name])
        assert "\n" not in str(error.value)


def test_an_export_runs_as_it_was_written(folders, report):
    for wrong in (dict(dtype=torch.bfloat16), dict(device="cuda")):
        with pytest.raises(ValueError, match="is an export: it runs on the CPU and in float32"):
            hfc.measure(folders / "onnx", **wrong)
    assert load_model(folders / "onnx", dtype=torch.float32).dtype == torch.float32  # as it is
    with pytest.raises(ValueError, match="is an export for ONNX Runtime"):
        hfc.model_card(report, model="onnx", repo_id="me/small")


@pytest.mark.long
@pytest.mark.parametrize(("family", "task"), [("llama", "clm"), ("bart", "seq2seq"), ("electra", "answers")])
@pytest.mark.parametrize("format", NAMES)
def test_other_tasks_are_scored_alike(format, family, task, tmp_path):
    changes = dict(encoder_layers=1, decoder_layers=1) if family == "bart" else dict(num_hidden_layers=1)
    model = hfc.quantize(with_spread(tiny_model(family, task, **changes)), embedding_bits=8, **ROWS)
    hfc.export(model, tmp_path / "model", format=format, tokenizer=tiny_tokenizer())
    batch = tiny_batch(model, padding=False)
    expected, found = model(**batch), load_model(tmp_path / "model")(**batch)
    for name in found.keys() & {"logits", "start_logits", "end_logits"}:
        torch.testing.assert_close(found[name], expected[name], atol=0.1, rtol=0.1)  # inputs rounded elsewhere
    assert hfc.compare({"model": model, "export": tmp_path / "model"}, **HOW)["export"].parameter_rate == 1
