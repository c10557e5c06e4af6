"""A stage that exports: compared with its model, kept, copied, and refused before anything runs where it cannot."""

import json
import sys

import pytest
from recipe_run import QUICK, reviews, tiny_folder
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_compress.commands.run import show
from hf_compress.measuring.measure import load_model
from hf_compress.recipe import Recipe, RecipeError
from hf_compress.recipe import evaluate as evaluation
from hf_compress.recipe.publish import Export
from hf_compress.recipe.training import Change

EIGHT = {"quantize": {"bits": 8, "symmetric": True}}
FOUR = {"quantize": {"bits": 4, "group_size": 16, "symmetric": True}}
EVALUATE = {"evaluate": {"models": "input", "batch_size": 8, **QUICK, "latency_rounds": 1, "throughput_rounds": 1}}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    data = {"source": str(reviews(folder / "r.csv", 20)), "max_length": 16}
    return {"model": tiny_folder(folder / "model", num_hidden_layers=1), "data": data}


def export(format, **options):
    return {"export": {"format": format, **options}}


def never(*args):
    pytest.fail("it had begun")


def test_a_recipe_ends_in_an_export_that_its_comparison_runs(work, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    stages = [EIGHT, export("onnx"), EVALUATE]
    result = Recipe(stages, **work).run(tmp_path / "out")
    assert result.exports == {"onnx": tmp_path / "out" / "onnx"}
    assert {"model.onnx", "README.md", "tokenizer.json"} <= {path.name for path in result.exports["onnx"].iterdir()}
    assert result.stages[1]["figures"]["texts"] > 0 and result.stages[1]["figures"]["outputs"]["logits"]["same_class"]
    entries = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["entries"]
    assert [entry["name"] for entry in entries] == ["input", "rtn", "export"]
    assert entries[2]["measurement"]["runtime"].startswith("ONNX Runtime")
    assert entries[2]["quality"] is not None and entries[2]["difference"] is not None
    show(result)
    printed = capsys.readouterr().out
    assert f"onnx    {result.exports['onnx']}" in printed and "ONNX Runtime" in printed
    monkeypatch.setattr(Export, "run", never)
    monkeypatch.setattr(evaluation, "evaluate", never)
    assert Recipe(stages, **work).run(tmp_path / "out").exports == result.exports  # all of it is kept


@pytest.mark.parametrize("format", ["plain", "gptq", "compressed-tensors"])
def test_checkpoints_for_other_readers_are_complete(format, work, tmp_path):
    result = Recipe([FOUR, export(format)], **work).run(tmp_path / "out")
    names = {path.name for path in result.exports[format].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    if format == "plain":
        config = json.loads((result.exports[format] / "config.json").read_text(encoding="utf-8"))
        assert "quantization_config" not in config
        assert load_model(result.exports[format]).num_parameters() == load_model(work["model"]).num_parameters()


def test_the_exports_of_another_model_go(work, tmp_path):
    output = tmp_path / "out"
    Recipe([FOUR, export("plain"), export("gptq")], **work).run(output)
    before = (output / "plain" / "model.safetensors").read_bytes()
    result = Recipe([{"quantize": {**FOUR["quantize"], "bits": 2}}, export("plain", name="last")], **work).run(output)
    assert (output / "plain" / "model.safetensors").read_bytes() != before and not (output / "gptq").exists()
    assert list(result.exports) == ["plain"]
    Recipe([FOUR], **work).run(output)
    assert not (output / "plain").exists()
    assert [path.name for path in output.glob(".*.fingerprint")] == [".model.fingerprint"]


def test_a_comparison_takes_the_exports_of_its_own_model_alone(work, tmp_path, monkeypatch):
    seen = []

    def evaluate(options, models, data, command):
        seen.append(models)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    cut = {"prune": {"method": "structure", "neurons": 0.5}}
    for stages in (
        [export("plain", name="early"), cut, export("plain", name="late"), EVALUATE],
        [FOUR, export("gptq"), EVALUATE],
    ):
        with pytest.raises(KeyboardInterrupt):
            Recipe(stages, **work).run(tmp_path / "out")
    assert [list(models) for models in seen] == [["input", "structure", "late"], ["input", "rtn"]]  # GPTQ's is not run
    assert (seen[0]["late"] / "model.safetensors").is_file()


def test_a_full_disk_or_a_kill_leaves_no_half_export(work, tmp_path, monkeypatch):
    output, save = tmp_path / "out", PreTrainedModel.save_pretrained

    def full(model, folder, *args, **kwargs):
        save(model, folder, *args, **kwargs)
        if ".export" in str(folder):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        Recipe([EIGHT, export("plain")], **work).run(output)
    assert not list(output.rglob("export/*")) and not (output / "plain").exists()
    half = next(output.glob("stages/*export*.partial")) / "export"
    half.mkdir()
    (half / "config.json").write_text("half", encoding="utf-8")
    result = Recipe([EIGHT, export("plain")], **work).run(output)
    AutoModelForSequenceClassification.from_pretrained(result.exports["plain"])


def test_the_folder_of_somebody_else_is_refused_before_anything_runs(work, tmp_path, monkeypatch):
    Recipe([EIGHT], **work).run(tmp_path / "out")
    (tmp_path / "out" / "plain").mkdir()
    (tmp_path / "out" / "plain" / "notes.txt").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(Change, "run", never)
    with pytest.raises(ValueError, match="plain/notes.txt in .* would be replaced"):
        Recipe([FOUR, export("plain")], **work).run(tmp_path / "out")
    assert (tmp_path / "out" / "plain" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_what_cannot_be_exported_is_refused_before_anything_runs(work, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="format must be one of .*, got 'tensorrt'"):
        Recipe([export("tensorrt")])
    with pytest.raises(RecipeError, match="format"):
        Recipe(["export"])
    monkeypatch.setattr(Change, "run", never)
    for package, format in (("openvino", "openvino"), ("onnxruntime", "onnx"), ("gguf", "gguf")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            for module in [name for name in sys.modules if name.startswith("hf_compress.formats.") and format in name]:
                patch.delitem(sys.modules, module)
            with pytest.raises(RecipeError, match=rf"export: .*pip install 'hf_compress\[{format}\]'"):
                Recipe([EIGHT, export(format)], **work).run(tmp_path / "out")
    pytest.importorskip("gguf")
    with pytest.raises(RecipeError, match="gguf holds language models of .*, not a bert for sequence-classification"):
        Recipe([EIGHT, export("gguf")], **work).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
