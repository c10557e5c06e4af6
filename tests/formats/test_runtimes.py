"""What every folder for a runtime goes through: traced, compared, written whole or not at all."""

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model
from runtime_models import ROWS, SMALL, every_scheme, tiny_tokenizer, with_spread

import hf_compress as hfc
from hf_compress.formats.named_weight import named_weights
from hf_compress.formats.runtimes import folder as runtimes
from hf_compress.formats.runtimes.agreement import Session, check_batches, compare
from hf_compress.formats.runtimes.folder import in_eval, quiet, write_folder
from hf_compress.formats.runtimes.traced import traced
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.packed_blocks import PackedBlocksLinear


def echo(*, error: float = 0.0, fast_error: float = 0.0):
    """A runtime that runs the model itself, and adds `error` to what it says, `fast_error` where it is fast."""

    class Echo:
        format, tested, folded = "openvino", {"numpy": np.__version__}, []

        def __init__(self, model, inputs):
            self.model = model

        def save(self, folder):
            (folder / "model.bin").write_bytes(b"model")
            self.model.config.save_pretrained(folder)

        def fast_session(self):
            return self.session(error=fast_error)

        def session(self, *, watch=False, error=error):
            def run(fed):
                with torch.no_grad():
                    logits = self.model(**{k: torch.from_numpy(v) for k, v in fed.items()}).logits.float().numpy()
                return {"logits": logits + error}

            return Session({"input_ids": (None, None), "attention_mask": (None, None)}, run)

    return Echo


def test_a_packed_weight_is_what_its_layer_multiplies_by():
    model = every_scheme()
    for embedded in (model, hfc.quantize(tiny_model("bert", **SMALL), bits=4, embedding_bits=4, group_size=16)):
        for weight in named_weights(embedded):
            scales = np.repeat(weight.scales.astype(np.float64), weight.group_size, axis=1)
            values = weight.signed() * scales
            if weight.order is not None:
                values = values[:, np.argsort(weight.order)]
            expected = embedded.get_submodule(weight.name).dequantize(torch.float32).numpy()
            np.testing.assert_allclose(values, expected, rtol=1e-6, atol=0)  # one float32 product
    assert sum(weight.order is not None for weight in named_weights(model)) == 4


def test_codebooks_and_act_order_are_refused_by_name():
    coded = hfc.quantize(tiny_model("bert", **SMALL), bits=4, grid="kmeans", group_size=-1)
    with pytest.raises(ValueError, match="attention.self.query has a codebook"):
        list(named_weights(coded))
    with pytest.raises(ValueError, match=r"attention.self.query: groups must be neighbouring"):
        list(named_weights(every_scheme(), act_order=False))


def test_layers_with_the_same_weight_are_told_apart():
    model = tiny_model("bert", **SMALL)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight.zero_()
            layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
    hfc.quantize(model, **ROWS)
    trace = traced(model)
    for name in (f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in ("output.dense", "attention.self.key")):
        weight = trace.model.get_submodule(name).weight.detach().numpy()
        assert trace.find(weight) == (name, False) and trace.find(weight.T.copy()) == (name, True)
        np.testing.assert_allclose(weight, model.get_submodule(name).dequantize().numpy(), rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_what_is_traced_is_ordinary_and_the_model_stays(family):
    model = hfc.quantize(tiny_model(family), bits=4, embedding_bits=8, group_size=16)
    batch, before = tiny_batch(model, padding=False), model.config.to_dict()
    trace = traced(model)
    names = {weight.name for weight in named_weights(model)}
    assert {name for name, _ in trace.names.values()} == names
    for name in names:  # GPT-2's Conv1D stores (K, N)
        weight = trace.model.get_submodule(name).weight.detach().numpy()
        assert trace.find(weight) == (name, type(trace.model.get_submodule(name)).__name__ == "Conv1D")
    assert model.config.to_dict() == before and not hasattr(trace.model.config, "quantization_config")
    # the packed model may multiply in bfloat16 where that is fast
    torch.testing.assert_close(trace.model(**batch).logits, model(**batch).logits, atol=2e-2, rtol=2e-2)


def test_block_sparse_layers_leave_with_their_zeros_and_it_is_said(tmp_path, caplog):
    model = with_spread(tiny_model("bert", num_hidden_layers=1, hidden_size=64, intermediate_size=64))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:32, :32] = 0
    hfc.to_block_sparse(model, 32)
    batch, plain = tiny_batch(model), traced(model).model
    assert not any(isinstance(module, BlockSparseLinear) for module in plain.modules())
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits)
    with caplog.at_level(logging.WARNING):
        write_folder(model, tmp_path / "model", echo(), tiny_tokenizer(), None)
    assert "output.dense'] leave with their zeros" in caplog.text
    contents = json.loads((tmp_path / "model" / "hf_compress.json").read_text(encoding="utf-8"))
    assert contents["left_dense"] == ["bert.encoder.layer.0.output.dense"]


def test_packed_layers_without_their_empty_blocks_leave_with_them_and_it_is_said(tmp_path, caplog):
    model, name = with_spread(tiny_model("bert", **SMALL)), "bert.encoder.layer.0.output.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[:, 32:] = 0
    hfc.quantize(model, **ROWS)
    blocks = PackedBlocksLinear.of(model.get_submodule(name), 16)
    model.set_submodule(name, blocks)
    with caplog.at_level(logging.WARNING):
        write_folder(model, tmp_path / "model", echo(), tiny_tokenizer(), None)
    assert f"['{name}'] leave with their zeros" in caplog.text
    weight = next(weight for weight in named_weights(model) if weight.name == name)
    assert weight.q.shape == (32, 64) and (weight.signed()[:, 32:] == 0).all()


def test_differences_by_hand():
    expected, found = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 3.0], [0.0, 1.0]])
    measured = compare(expected, found, is_class=True)
    assert measured["largest_difference"] == 1.0
    assert measured["relative_difference"] == pytest.approx((2 / 25) ** 0.5)  # sqrt(2/4) over sqrt(25/4)
    assert measured["same_class"] == 0.0  # 4 > 3 became a tie, which goes to the first; 0 = 0 became the second
    measured = compare(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]), is_class=False)
    assert measured["cosine"] == pytest.approx(2**-0.5)


def test_sixty_four_texts_of_the_calibration_or_random():
    model = tiny_model("bert", **SMALL)
    rows = [{"input_ids": [7] * (3 + i % 5)} for i in range(100)]
    assert sum(len(batch["input_ids"]) for batch in check_batches(model, rows)) == 64
    assert {int(batch["input_ids"].max()) for batch in check_batches(model, rows)} == {7}
    texts = check_batches(model, ["the film was good", "bad"] * 40, tiny_tokenizer())
    assert sum(len(batch["input_ids"]) for batch in texts) == 64
    random = check_batches(model, None)
    assert sum(len(batch["input_ids"]) for batch in random) == 64
    assert len({batch["input_ids"].shape for batch in random}) == 2 and (random[1]["attention_mask"] == 0).any()


@pytest.mark.parametrize(
    ("error", "kind"), [(1.0, "packed"), (float("nan"), "packed"), (1.0, "bfloat16"), (0.05, "float")]
)
def test_a_runtime_that_says_something_else_leaves_nothing(error, kind, tmp_path):
    model = with_spread(tiny_model("bert", **SMALL))
    if kind == "packed":
        hfc.quantize(model, **ROWS)
    elif kind == "bfloat16":  # leaves in float32, so it may differ by its rounding
        model.bfloat16()
        write_folder(model, tmp_path / "model", echo(error=0.01), tiny_tokenizer(), None)
        shutil.rmtree(tmp_path / "model")
    with pytest.raises(RuntimeError, match="differs from the model by .*Nothing was kept"):
        write_folder(model, tmp_path / "model", echo(error=error), tiny_tokenizer(), None)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_folder(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtimes, "write_readme", full)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tiny_model("bert", **SMALL), tmp_path / "model", echo(), tiny_tokenizer(), None)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk():
    """Files end at 8 kB, as on a disk that is full: what writes more is told so, by the system itself."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


LONG = pytest.mark.long


@pytest.mark.parametrize("format", [pytest.param("openvino", marks=LONG), pytest.param("onnx", marks=LONG), "gguf"])
def test_a_file_that_ends_too_early_leaves_no_half_folder(format, tmp_path, small_disk):
    pytest.importorskip({"onnx": "onnxscript"}.get(format, format))
    model = tiny_model("bert", **SMALL)
    with pytest.raises((OSError, RuntimeError), match=r"(?i)too large|iostream|and \d+ written"):
        hfc.export(model.bert if format == "gguf" else model, tmp_path / "model", format=format,
                   tokenizer=tiny_tokenizer())  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / ".model.writing").mkdir()
    (tmp_path / ".model.writing" / "half").write_text("half", encoding="utf-8")
    (tmp_path / ".model.lock").touch()
    (tmp_path / "model").mkdir()
    write_folder(tiny_model("bert", **SMALL), tmp_path / "model", echo(), tiny_tokenizer(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"model.bin", "tokenizer.json", "README.md"}


def test_the_way_the_readme_runs_is_measured_too_and_must_agree(tmp_path):
    model = with_spread(tiny_model("bert", **SMALL))
    write_folder(model, tmp_path / "model", echo(fast_error=1e-4), tiny_tokenizer(), None)
    agreement = json.loads((tmp_path / "model" / "hf_compress.json").read_text(encoding="utf-8"))["agreement"]
    assert agreement["outputs"]["logits"]["largest_difference"] == 0
    assert agreement["on_this_processor"]["logits"]["largest_difference"] == pytest.approx(1e-4, rel=1e-2)
    with pytest.raises(RuntimeError, match="Nothing was kept"):
        write_folder(model, tmp_path / "other", echo(fast_error=0.5), tiny_tokenizer(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_labels_are_there_also_where_a_config_leaves_them_out(tmp_path):
    write_folder(tiny_model("bert", **SMALL), tmp_path / "model", echo(), tiny_tokenizer(), None)
    labels = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))["id2label"]
    assert labels == {"0": "LABEL_0", "1": "LABEL_1"}


def test_other_versions_are_said(tmp_path, caplog):
    kind = echo()
    kind.tested = {"numpy": "1.0"}
    with caplog.at_level(logging.WARNING):
        write_folder(tiny_model("bert", **SMALL), tmp_path / "model", kind, tiny_tokenizer(), None)
    assert "tested with {'numpy': '1.0'}" in caplog.text


def test_modules_get_their_own_mode_back():
    model = tiny_model("bert", **SMALL).train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    with in_eval(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def forget_formats(monkeypatch):
    """They are imported anew, and afterwards as they were, in their packages as well."""
    for name in sorted(name for name in sys.modules if name.startswith("hf_compress.formats.")):
        package, _, leaf = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(package), leaf, sys.modules[name], raising=False)
    for name in [name for name in sys.modules if name.startswith("hf_compress.formats.")]:
        monkeypatch.delitem(sys.modules, name)


def test_older_transformers_are_told_which_version_has_exporters(tmp_path, monkeypatch):
    forget_formats(monkeypatch)
    for name in ("transformers.exporters", "transformers.exporters.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    export = importlib.import_module("hf_compress.formats.export").export
    pytest.importorskip("openvino")
    with pytest.raises(ImportError, match=r"since 5\.23; installed is 5\."):
        export(tiny_model("bert", **SMALL), tmp_path / "model", format="openvino")


MISSING = [("openvino", "openvino"), ("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("gguf", "gguf")]


@pytest.mark.parametrize(("format", "package"), MISSING)
def test_a_package_that_is_missing_names_the_extra_that_brings_it(format, package, tmp_path, monkeypatch):
    forget_formats(monkeypatch)
    monkeypatch.setitem(sys.modules, package, None)
    export = importlib.import_module("hf_compress.formats.export").export
    with pytest.raises(ImportError, match=rf"format='{format}' needs .*pip install 'hf_compress\[{format}\]'"):
        export(tiny_model("bert", **SMALL), tmp_path / "model", format=format)
    assert not list(tmp_path.iterdir())


def test_an_export_says_what_is_ours_to_say(caplog, capsys):
    other = logging.getLogger("/somewhere/transformers/exporters/exporter_dynamo.py")
    with caplog.at_level(logging.WARNING):
        with quiet():
            other.warning("an axis is dynamic")
            print("a step is done")
            runtimes.logger.warning("ours")
        other.warning("afterwards")
    assert [record.message for record in caplog.records] == ["ours", "afterwards"] and not capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_a_fresh_environment_with_the_runtime_alone_runs_the_readme(format, tmp_path):
    pytest.importorskip({"openvino": "openvino", "onnx": "onnxscript"}[format])
    model = hfc.quantize(tiny_model("bert", id2label={0: "bad", 1: "good"}, **SMALL), embedding_bits=8, **ROWS)
    folder = hfc.export(model, tmp_path / "model", format=format, tokenizer=tiny_tokenizer())
    text = (folder / "README.md").read_text(encoding="utf-8")
    code, install = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "bash"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", *install.split(), "-q"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([python, "-c", code], cwd=folder, env=environment, check=True, capture_output=True, text=True)
    assert re.fullmatch(r"\['(good|bad)', '(good|bad)'\]", run.stdout.strip())
    missing = subprocess.run([python, "-c", "import torch"], env=environment, capture_output=True)
    assert missing.returncode != 0
