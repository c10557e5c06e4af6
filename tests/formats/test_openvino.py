"""OpenVINO folders: what they say is what the packed model says, and nothing half written stays."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model
from machine import needs_fork
from runtime_models import (
    ROWS,
    SMALL,
    every_scheme,
    readme_code,
    run_readme,
    tiny_tokenizer,
    trained_ranges,
    with_spread,
)

import hf_compress as hfc
from hf_compress.engines.processor import has_int8

ov = pytest.importorskip("openvino")

from hf_compress.formats.named_weight import named_weights  # noqa: E402
from hf_compress.formats.openvino import dynamic_group, fake_quantize, round_tokens, weight_nodes  # noqa: E402
from hf_compress.formats.runtimes import openvino_session  # noqa: E402
from hf_compress.formats.runtimes.agreement import Session, feed  # noqa: E402
from hf_compress.formats.runtimes.openvino_session import WITHOUT_OVERFLOW, core, open_folder, session  # noqa: E402
from hf_compress.layers.activations import round_per_token, round_to_range  # noqa: E402


@pytest.fixture(scope="module")
def classifier():
    return trained_ranges(with_spread(tiny_model("bert", id2label={0: "bad", 1: "good"}, **SMALL)))


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvino") / "model"
    return hfc.export(classifier, folder, format="openvino", tokenizer=tiny_tokenizer())


def integers(folder):
    """The constants of integers in the file, by their type."""
    model = core().read_model(folder / "openvino_model.xml")
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return [n.get_element_type().get_type_name() for n in constants if len(n.get_output_shape(0)) > 1]


def test_the_folder_is_complete_and_agrees(folder, classifier):
    names = {path.name for path in folder.iterdir()}
    assert names >= {"openvino_model.xml", "openvino_model.bin", "tokenizer.json", "config.json", "README.md",
                     "export.json", "hf_compress.json"}  # fmt: skip
    contents = json.loads((folder / "hf_compress.json").read_text(encoding="utf-8"))
    assert contents["packages"]["openvino"] and contents["packed_weights"]["8 bit"] > 0
    logits = contents["agreement"]["outputs"]["logits"]
    assert contents["agreement"]["texts"] == 64
    # both round to the same trained grids: only ties at a grid's middle may fall to the other side
    assert logits["same_class"] >= 0.98 and logits["relative_difference"] < 0.01
    assert ("on_this_processor" in contents["agreement"]) == has_int8()  # products of integers where they are exact
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = integers(folder)
    assert kinds.count("i8") == 12 + 3  # six linear maps a layer, three tables
    assert classifier.config.quantization_config["bits"]  # the model stays as it was


def test_trained_ranges_are_one_rounding_for_all_readers_of_a_tensor(folder):
    operations = [node.get_type_name() for node in core().read_model(folder / "openvino_model.xml").get_ops()]
    assert operations.count("FakeQuantize") == 2 * 4  # q, k and v read one tensor; output; up; down


@pytest.mark.parametrize("told", ["flags : avx2 avx512_vnni", "flags : avx2 avx_vnni", "flags : avx2", None])
def test_the_readme_and_we_use_products_of_integers_only_where_they_are_exact(told, folder, monkeypatch):
    opened = []
    code = readme_code(folder)
    monkeypatch.setattr(ov.Core, "compile_model", lambda core, model, device, options: opened.append(options) or 1 / 0)
    monkeypatch.setattr("os.path.exists", lambda path: told is not None)
    monkeypatch.setattr("builtins.open", lambda *args: io.StringIO(told))
    with pytest.raises(ZeroDivisionError):
        exec(code, {})
    monkeypatch.undo()
    assert ("LP_TRANSFORMS_MODE" in opened[0]) == (told is None or "vnni" not in told)
    assert opened[0]["INFERENCE_PRECISION_HINT"] == "f32"


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_folder_opens_with_products_of_integers_only_where_they_are_exact(is_exact, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(openvino_session, "has_int8", lambda: is_exact)
    monkeypatch.setattr(openvino_session, "session", lambda model, options: asked.append(options))
    for exact in (None, True, False):
        open_folder(folder, exact=exact)
    assert ["LP_TRANSFORMS_MODE" in options for options in asked] == [not is_exact, True, False]


def test_the_readme_runs_and_finds_the_labels(folder, classifier, monkeypatch, capsys):
    scope = run_readme(folder, monkeypatch)
    tokens = tiny_tokenizer()(["A fine film.", "Two hours that I shall never get back."], padding=True,
                              return_tensors="pt")  # fmt: skip
    expected = classifier(**tokens).logits
    torch.testing.assert_close(torch.from_numpy(scope["outputs"]["logits"]), expected, atol=0.02, rtol=0.02)
    assert capsys.readouterr().out.strip() == str([("bad", "good")[i] for i in expected.argmax(-1)])


def test_transformers_opens_the_folder(folder, classifier):
    from transformers.exporters import ExportedModel

    batch = {**tiny_batch(classifier), "token_type_ids": torch.zeros(3, 10, dtype=torch.long)}
    logits = ExportedModel.from_pretrained(folder, device="cpu", config=WITHOUT_OVERFLOW)(**batch)
    torch.testing.assert_close(logits.logits, classifier(**batch).logits, atol=0.02, rtol=0.02)


def test_the_folder_opens_with_as_many_threads_as_are_asked_for(folder, classifier):
    batch = tiny_batch(classifier)
    opened = open_folder(folder, threads=1)
    logits = torch.from_numpy(opened.run(feed(opened, batch))["logits"])
    torch.testing.assert_close(logits, classifier(**batch).logits, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5)])  # texts; choices of each
def test_what_is_not_given_has_the_shape_of_the_ids(shape):
    names = "input_ids", "attention_mask", "token_type_ids"
    fed = feed(Session({name: (None,) * len(shape) for name in names}, dict), {"input_ids": torch.full(shape, 7)})
    assert {name: (value.shape, value.flat[0]) for name, value in fed.items()} == {
        "input_ids": (shape, 7), "attention_mask": (shape, 1), "token_type_ids": (shape, 0)
    }  # fmt: skip


def test_answers_stay_and_arrays_may_lie_in_any_order(folder, classifier):
    session = open_folder(folder)
    fed = feed(session, tiny_batch(classifier))
    first = session.run(fed)
    kept = {name: value.copy() for name, value in first.items()}
    session.run({name: value[:1, :3] for name, value in fed.items()})  # other texts, of another size, a view
    again = session.run({name: np.asfortranarray(value.astype(np.int32)) for name, value in fed.items()})
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)
        np.testing.assert_array_equal(again[name], value)


def test_every_scheme_leaves_exactly(tmp_path, monkeypatch):
    """Act-order, groups, zero points and 2, 3 and 4 bit: with float inputs only the order of sums differs."""
    model = every_scheme()
    hfc.export(model, tmp_path / "model", format="openvino")
    contents = json.loads((tmp_path / "model" / "hf_compress.json").read_text(encoding="utf-8"))
    # the packed model may multiply in bfloat16 (5e-3 of a product), the runtime may round inputs to 8 bit
    assert contents["agreement"]["outputs"]["logits"]["relative_difference"] < 0.05
    kinds = integers(tmp_path / "model")
    assert kinds.count("u4") == 2 * 3 and kinds.count("u8") == 2 * 1
    assert "tokenizer.json" not in {path.name for path in (tmp_path / "model").iterdir()}
    assert run_readme(tmp_path / "model", monkeypatch)["outputs"]["logits"].shape == (1, 2)


def test_a_decoder_reads_and_goes_on(tmp_path, monkeypatch):
    """GPT-2: Conv1D, a tied packed table, and a cache inside the graph."""
    model = hfc.quantize(with_spread(tiny_model("gpt2", n_layer=2)), bits=4, group_size=16, embedding_bits=8)
    hfc.export(model, tmp_path / "model", format="openvino", tokenizer=tiny_tokenizer())
    scope = run_readme(tmp_path / "model", monkeypatch)
    prompt = torch.from_numpy(scope["inputs"]["input_ids"][:1])
    with torch.no_grad():
        tokens = prompt
        for _ in range(20):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert np.mean(np.array(scope["tokens"]) == tokens[0].numpy()) > 0.9  # near ties may fall to the other side
    batch = tiny_batch(model)  # beside each other, texts of different lengths end together
    batch = {name: value.flip(1) for name, value in batch.items()}
    positions = batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    # without the rounding of inputs to 8 bits, which some processors have (0.08 here): what is asked is what is read
    program = core().read_model(tmp_path / "model" / "openvino_model.xml")
    opened, real = (
        session(program, {**WITHOUT_OVERFLOW, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}),
        batch["attention_mask"] > 0,
    )
    found = torch.from_numpy(opened.run(feed(opened, batch))["logits"])
    assert not real[1, 0] and positions[1].max() < positions[0].max()
    torch.testing.assert_close(found[real], model(**batch).logits[real], atol=0.02, rtol=0.02)
    assert not (tmp_path / "model" / "modules.json").exists()  # it gives logits, not vectors
    kinds = integers(tmp_path / "model")
    assert kinds.count("u8") == 4  # both tables with their zero points; the tied one is written once


def test_layers_without_heads_or_neurons_leave(tmp_path):
    model = with_spread(tiny_model("bert", **SMALL))
    for name, bias in model.named_parameters():
        torch.nn.init.normal_(bias) if name.endswith("dense.bias") else None
    hfc.prune_neurons(hfc.prune_heads(model, {0: range(4), 1: [1]}), {0: range(20), 1: range(64)})
    hfc.export(model, tmp_path / "model", format="openvino", tokenizer=tiny_tokenizer())
    opened = open_folder(tmp_path / "model")
    for length in (1, 7, 30):
        batch = tiny_batch(model, length=length, padding=length > 6)
        found = torch.from_numpy(opened.run(feed(opened, batch))["logits"])
        torch.testing.assert_close(found, model(**batch).logits, atol=1e-4, rtol=1e-4)


WHOLE = {
    "classification": lambda: ("bert", "classification", dict(num_hidden_layers=1)),
    "several-labels": lambda: ("roberta", "classification", dict(problem_type="multi_label_classification")),
    "tokens": lambda: ("distilbert", "tokens", dict(n_layers=1)),
    "answers": lambda: ("electra", "answers", dict(num_hidden_layers=1)),
    "mlm": lambda: ("modernbert", "mlm", dict(num_hidden_layers=2)),
    "deberta": lambda: ("deberta-v2", "classification", dict(num_hidden_layers=2)),
    "llama": lambda: ("llama", "clm", dict(num_hidden_layers=2)),
    "qwen3": lambda: ("qwen3", "clm", dict(num_hidden_layers=2)),
    "gemma3": lambda: ("gemma3_text", "clm", dict(num_hidden_layers=2)),
    "bart": lambda: ("bart", "seq2seq", dict(encoder_layers=1, decoder_layers=1)),
}


@pytest.mark.long
@pytest.mark.parametrize("case", WHOLE)
def test_every_family_and_task_leaves(case, tmp_path):
    family, task, changes = WHOLE[case]()
    model = hfc.quantize(with_spread(tiny_model(family, task, **changes)), embedding_bits=8, **ROWS)
    hfc.export(model, tmp_path / "model", format="openvino", tokenizer=tiny_tokenizer())
    outputs = json.loads((tmp_path / "model" / "hf_compress.json").read_text(encoding="utf-8"))["agreement"]["outputs"]
    assert all(output["relative_difference"] < 0.05 for output in outputs.values())


def test_the_grid_of_a_range_is_ours():
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    source = ov.opset13.parameter([-1, 8], np.float32)
    for low, high in ((-1.3, 2.0), (0.0, 1.7), (-0.2, 0.9)):
        node = fake_quantize(source.output(0), low, high)
        run = core().compile_model(ov.Model([node], [source]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        expected = round_to_range(torch.from_numpy(x), low, high).numpy()
        step = (high - low) / 255
        differs = np.abs(run(x)[0] - expected) > step / 2  # a tie may fall to the other side, by one step
        assert differs.mean() < 0.01 and np.abs(run(x)[0] - expected).max() < 1.01 * step


SIGNALLED = """
import faulthandler, gc, os, signal, sys
from pathlib import Path
from hf_compress.formats.runtimes.openvino_session import open_folder
faulthandler.enable()  # handlers run on a stack of their own from now on, if the thread has one
signal.signal(signal.SIGALRM, lambda *_: print("handled"))
first, second = (open_folder(Path(sys.argv[1])) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGALRM)
"""


@needs_fork
def test_a_signal_is_handled_after_sessions_have_ended(folder):
    ended = subprocess.run([sys.executable, "-c", SIGNALLED, folder], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, "handled"), ended.stderr[-1000:]


CAPPED = """
import sys
from pathlib import Path
import torch
from hf_compress.engines.processor import has_int8
from hf_compress.formats.runtimes.opened import open_exported
print(has_int8(), open_exported(Path(sys.argv[1]))(input_ids=torch.arange(9, 19)[None]).logits.tolist())
"""


def test_a_processor_held_back_runs_what_rounds_inputs_as_they_come(tmp_path):
    """oneDNN obeys the cap and the plugin does not: it would ask for products of integers, which oneDNN refused."""
    model = hfc.quantize(with_spread(tiny_model("bert", **SMALL)), embedding_bits=8, **ROWS)
    folder = hfc.export(model, tmp_path / "model", format="openvino", tokenizer=tiny_tokenizer())
    capped = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ended = subprocess.run([sys.executable, "-c", CAPPED, folder], capture_output=True, text=True, env=capped)
    assert ended.returncode == 0, ended.stderr[-1000:]
    has_int8, logits = ended.stdout.split(maxsplit=1)
    assert has_int8 == "False"
    with torch.no_grad():
        expected = model(input_ids=torch.arange(9, 19)[None]).logits
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, atol=0.02, rtol=0.02)


def test_each_token_is_rounded_where_the_model_rounds_it():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3], x[7] = 50, 0  # a step of 0.4 for all others; a token of zeros
    source = ov.opset13.parameter([-1, 8], np.float32)
    run = core().compile_model(ov.Model([round_tokens(source.output(0))], [source]), "CPU", WITHOUT_OVERFLOW)
    np.testing.assert_allclose(run(x.numpy())[0], round_per_token(x).numpy(), rtol=1e-6)


def test_the_group_of_inputs_fits_every_weight():
    def group(**options):
        return dynamic_group({w.name: w for w in named_weights(hfc.quantize(tiny_model("bert", **SMALL), **options))})

    assert group(**ROWS) == 32  # of 32 columns; 64 would turn the rounding off
    assert group(bits=4, group_size=16) == 16
    assert group(bits=4, group_size=8) == 0
    assert dynamic_group({}) == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_an_odd_number_of_columns_are_multiplied_right(symmetric):
    model, name = (
        with_spread(tiny_model("bert", **{**SMALL, "intermediate_size": 43})),
        "bert.encoder.layer.0.output.dense",
    )
    weight = next(named_weights(hfc.quantize(model, {name: 4}, group_size=-1, symmetric=symmetric)))
    source = ov.opset13.parameter([-1, 43], np.float32)
    product = ov.opset13.matmul(source, weight_nodes(weight), False, True)
    x = torch.randn(24, 43, generator=torch.Generator().manual_seed(0))
    found = core().compile_model(ov.Model([product], [source]), "CPU", WITHOUT_OVERFLOW)(x.numpy())[0]
    expected = x @ model.get_submodule(name).dequantize(torch.float32).T
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=0.05, rtol=0.05)  # inputs may be rounded


def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path, classifier, monkeypatch):
    model = hfc.quantize(tiny_model("bert", **SMALL), bits=4, grid="kmeans", group_size=-1)
    with pytest.raises(ValueError, match="attention.self.query has a codebook"):
        hfc.export(model, tmp_path / "model", format="openvino")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty"):
        hfc.export(classifier, tmp_path / "taken", format="openvino")
    with pytest.raises(ValueError, match="calibration is for"):
        hfc.export(classifier, tmp_path / "model", format="plain", calibration=[])
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}


def test_a_wrong_weight_is_found_and_named(tmp_path, classifier, monkeypatch):
    import hf_compress.formats.openvino as module

    def damaged(model):
        for weight in named_weights(model):
            yield weight if weight.name != "bert.encoder.layer.1.output.dense" else zeroed(weight)

    def zeroed(weight):
        return weight.__class__(**{**vars(weight), "q": np.full_like(weight.q, 255)})

    monkeypatch.setattr(module, "named_weights", damaged)
    with pytest.raises(RuntimeError, match=r"first layer that differs is bert\.encoder\.layer\.1\.output\.dense"):
        hfc.export(classifier, tmp_path / "model", format="openvino", tokenizer=tiny_tokenizer())
    assert not list(tmp_path.iterdir())
