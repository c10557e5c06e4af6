"""One command from a model and texts to a folder that runs: tiny, to its end."""

import json
import math
import re
import shutil

import pytest
import torch
from helpers import tiny_model
from recipe.task_files import CASES, model_of, source_of, text
from recipe_run import embedder, reviews, tiny_folder
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hfc
from hf_compress.commands.main import main
from hf_compress.formats.runtimes.agreement import BOUND
from hf_compress.measuring.counting import num_parameters
from hf_compress.model.pooling import Pooling, read_vectors
from hf_compress.pruning.targets import StructureTimes
from hf_compress.recipe.options import RecipeError
from hf_compress.shrinking import plan as planning
from hf_compress.shrinking import run as shrinking
from hf_compress.shrinking import times as timing
from hf_compress.shrinking.times import MeasuredTimes, measured_times

QUICK = {"max_steps": 4, "per_device_train_batch_size": 8, "save_steps": 2, "disable_tqdm": True, "bf16": False,
         "use_cpu": True}  # fmt: skip


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A folder and texts; what structures cost is made up, so that a busy machine does not decide."""
    times = MeasuredTimes(30.0, StructureTimes(1.0, 2.0, 3.0, 0.5), "a machine")
    monkeypatch.setattr(shrinking, "measured_times", lambda *args, **kwargs: times)
    monkeypatch.setattr(shrinking, "MEASURING", {"latency_rounds": 2, "throughput_rounds": 2, "isolate": False})
    return tiny_folder(tmp_path / "model"), {"source": str(reviews(tmp_path / "r.csv")), "max_length": 16}


def test_a_size_is_reached_and_everything_is_there(given, tmp_path):
    model, data = given
    whole = (model / "model.safetensors").stat().st_size / 1e6
    done = hfc.shrink(model, data, output=tmp_path / "out", size_mb=whole / 5, changes=QUICK)
    result = json.loads((tmp_path / "out" / "shrink.json").read_text(encoding="utf-8"))
    assert done.is_met and done.reached == result["reached"] <= 1.1 * whole / 5
    assert (tmp_path / "out" / "report.html").is_file()
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / result["model"])
    assert small.config.quantization_config["bits"] and small.config.id2label == {0: "neg", 1: "pos"}
    assert [entry.name for entry in done.report.entries] == ["original", "small"]


@pytest.mark.parametrize("runtime", ["openvino", pytest.param("onnx", marks=pytest.mark.long)])
def test_a_speed_in_a_runtime_ends_in_its_folder(runtime, given, tmp_path, monkeypatch):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxscript")
    model, data = given
    monkeypatch.setattr(shrinking, "PASSES", 1)
    done = hfc.shrink(model, data, output=tmp_path / "out", speedup=3.0, runtime=runtime, changes=QUICK)
    assert (done.model / "README.md").is_file() and done.model.name.startswith("exported-")
    assert done.reached == done.report.entries[1].latency_speed_up.value
    assert json.loads((tmp_path / "out" / "shrink.json").read_text(encoding="utf-8"))["passes"] == 1


def test_a_plan_runs_nothing(given, tmp_path, capsys):
    model, data = given
    arguments = ["shrink", str(model), "--data", data["source"], "--output", str(tmp_path / "out"), "--speedup", "3"]
    assert main([*arguments, "--plan"]) == 0
    told = capsys.readouterr().out
    assert "wanted    3.0x as fast, in torch" in told and "aim       10.00 ms" in told and "42 with a label" in told
    assert not (tmp_path / "out").exists()


def test_a_missed_wish_has_an_exit_code_of_its_own(given, tmp_path, capsys, monkeypatch):
    model, data = given
    monkeypatch.setattr(shrinking, "_figure", lambda wish, report: 2.0)  # whatever is made
    changes = [f"--set={name}={str(value).lower()}" for name, value in QUICK.items()]
    arguments = ["shrink", str(model), "--data", data["source"], "--output", str(tmp_path / "out"), "--speedup", "3"]
    assert main([*arguments, "--max_length", "16", *changes]) == 3
    assert "missed  2.0x as fast" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "shrink.json").read_text(encoding="utf-8"))["passes"] == 2


def test_the_first_model_stays_where_the_second_misses(given, tmp_path, monkeypatch):
    model, data = given
    figures = iter([6.0, 1.0])  # twice as fast as asked for; then, aimed lower, too slow
    monkeypatch.setattr(shrinking, "_figure", lambda wish, report: next(figures))
    done = hfc.shrink(model, data, output=tmp_path / "out", speedup=3.0, changes=QUICK)
    result = json.loads((tmp_path / "out" / "shrink.json").read_text(encoding="utf-8"))
    assert done.is_met and done.reached == result["reached"] == 6.0 and result["passes"] == 2
    sizes = [num_parameters(AutoModelForSequenceClassification.from_pretrained(stage / "model"))
             for stage in (tmp_path / "out" / "run" / "stages").glob("*-packed-*")]  # fmt: skip
    assert len(set(sizes)) == 2
    assert num_parameters(AutoModelForSequenceClassification.from_pretrained(done.model)) == min(sizes)


def test_a_whole_model_that_is_faster_than_asked_for_is_made_once(given, tmp_path, monkeypatch):
    model, data = given
    monkeypatch.setattr(shrinking, "_figure", lambda wish, report: 6.0)
    done = hfc.shrink(model, data, output=tmp_path / "out", speedup=1.5, changes=QUICK)  # 20 ms, and all take 23
    assert json.loads((tmp_path / "out" / "shrink.json").read_text(encoding="utf-8"))["passes"] == 2
    again = hfc.shrink(model, data, output=tmp_path / "whole", speedup=1.01, changes=QUICK)  # 29.7 ms: nothing goes
    assert json.loads((tmp_path / "whole" / "shrink.json").read_text(encoding="utf-8"))["passes"] == 1
    assert done.is_met and again.is_met


def test_what_cannot_be_had_after_a_training_is_missed_and_not_lost(given, tmp_path, monkeypatch):
    model, data = given
    monkeypatch.setattr(shrinking, "_figure", lambda wish, report: 0.5)  # six times faster is less than one layer
    done = hfc.shrink(model, data, output=tmp_path / "out", speedup=3.0, changes=QUICK)
    assert not done.is_met and done.reached == 0.5 and (done.model / "config.json").is_file()
    assert json.loads((tmp_path / "out" / "shrink.json").read_text(encoding="utf-8"))["passes"] == 1


def test_bad_input_is_refused_before_anything_runs(given, tmp_path):
    model, data = given
    with pytest.raises(RecipeError, match="Say one thing that is wanted"):
        hfc.shrink(model, data, output=tmp_path / "out")
    with pytest.raises(RecipeError, match="runtime must be one of torch, openvino, onnx, llama.cpp, got 'tflite'"):
        hfc.shrink(model, data, output=tmp_path / "out", speedup=2.0, runtime="tflite")
    with pytest.raises(RecipeError, match="There is no model"):
        hfc.shrink(tmp_path / "nothing", data, output=tmp_path / "out", speedup=2.0)
    with pytest.raises(RecipeError, match="cannot be had here"):
        hfc.shrink(model, data, output=tmp_path / "out", speedup=50.0)
    assert not (tmp_path / "out").exists()


def test_a_small_size_costs_rare_words_before_anything_runs(given, tmp_path, monkeypatch):
    model, data = given
    monkeypatch.setattr(planning, "TABLE_SHARE", 0.0)  # that no count reaches
    plan = hfc.shrink(model, data, output=tmp_path / "out", size_mb=0.02, plan=True).plan
    assert re.search("cut vocabulary to what occurs 32 times, cut structure", plan)
    with pytest.raises(RecipeError, match="0.0 MB cannot be had here: .* tokens, those that occur 32 times"):
        hfc.shrink(model, data, output=tmp_path / "out", size_mb=0.001)
    assert not (tmp_path / "out").exists()


def test_what_is_only_timed_may_answer_by_chance(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    from hf_compress.formats import openvino

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setitem(BOUND, "rounded", 1e-9)
    write, folders, bounds = openvino.write, [], []

    def written(model, folder, *, bound, **options):
        """The first structure stands for all of them: each takes many seconds."""
        bounds.append(bound)
        shutil.copytree(folders[0], folder) if folders else write(model, folder, bound=bound, **options)
        folders.append(folder)

    monkeypatch.setattr(openvino, "write", written)
    source = tiny_folder(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    assert measured_times(model, AutoTokenizer.from_pretrained(source), "openvino", tokens=8).original > 0
    assert bounds == [math.inf] * 5


def test_times_are_measured_once_for_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder(tmp_path / "model")).eval()
    first = measured_times(model, None, "torch", tokens=8)
    assert first.original > 0 and first.structure.of(4) > 0
    assert measured_times(model, None, "torch", tokens=8) == first  # kept
    assert len(list((tmp_path / "hf_compress" / "times").iterdir())) == 1


def test_rounds_that_other_work_slowed_say_nothing_of_a_structure(tmp_path, monkeypatch):
    """Four layers, one, half of the heads, half of the neurons; most rounds are not alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    alone = [0.020, 0.009, 0.003, 0.007, 0.008]  # s: 1 ms and 2 a layer, of which heads take 1 and neurons 0.5
    slowed = [[s] * 5 + [s * (1.3 + number + turn % 7) for turn in range(25)] for number, s in enumerate(alone)]
    monkeypatch.setattr(timing, "time_interleaved", lambda *args, **kwargs: slowed)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder(tmp_path / "model")).eval()
    found = measured_times(model, None, "torch", tokens=8)
    assert found.original == pytest.approx(20)
    assert found.structure == StructureTimes(*map(pytest.approx, (1.0, 1.0, 0.5, 0.5)))


BY_TASK = {case.task: case for case in reversed(CASES)}


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=[pytest.mark.long] * (t != "token-classification")) for t in BY_TASK]
)
def test_every_task_has_its_dial(task, given, tmp_path):
    """From a model without head where there is one to learn: by time, and by size where texts are written."""
    case = BY_TASK[task]
    model, data = model_of(case, tmp_path / "begin"), {"source": str(source_of(case, tmp_path / "data"))}
    options = dict(zip((name.removeprefix("--") for name in case.options[::2]), case.options[1::2], strict=True))
    writes = task in ("causal-lm", "seq2seq-lm")
    megabytes = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
    wish = {"size_mb": megabytes / 5} if writes else {"speedup": 3.0}
    done = hfc.shrink(model, data | options | {"max_length": 16}, output=tmp_path / "out", task=task, changes=QUICK,
                      **wish)  # fmt: skip
    assert done.report.metric == case.metric
    assert case.auto_class.from_pretrained(done.model).config.quantization_config["bits"]
    if writes:
        assert done.is_met
        for asked, said in (({"speedup": 2.0}, "write token by token"), ({"accuracy_loss": 1.0}, "has perplexity")):
            with pytest.raises(RecipeError, match=said):
                hfc.shrink(model, data, output=tmp_path / "none", task=task, **asked)


MORE = {"size_mb": 0.03}, {"accuracy_loss": 50.0}, {"speedup": 3.0, "runtime": "openvino"}


@pytest.mark.parametrize("wish", [{"speedup": 3.0}, *(pytest.param(w, marks=pytest.mark.long) for w in MORE)], ids=str)
def test_an_embedder_has_its_dial(wish, given, tmp_path):
    model = embedder(tmp_path / "embedder", pooling=Pooling("cls"))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text(i) + " " + text(i // 10) for i in range(60)), encoding="utf-8")
    done = hfc.shrink(model, {"source": str(texts), "max_length": 16}, output=tmp_path / "out", changes=QUICK, **wish)
    assert done.report.metric == "rank correlation of cosines" and "distil into" in done.plan
    student = (
        done.model if "runtime" not in wish else next((tmp_path / "out" / "run" / "stages").glob("*packed*/model"))
    )
    assert read_vectors(student)[0] == Pooling("cls")
    assert AutoModel.from_pretrained(student).config.num_hidden_layers < 4


@pytest.fixture
def writer(tmp_path):
    """A folder with a language model that llama.cpp knows, and texts."""
    pytest.importorskip("gguf")
    from formats.test_gguf import byte_tokenizer, llama

    model = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=300)
    model.save_pretrained(tmp_path / "writer")
    byte_tokenizer().save_pretrained(tmp_path / "writer")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text(i) + " " + text(i // 10) for i in range(60)), encoding="utf-8")
    return tmp_path / "writer", {"source": str(texts), "max_length": 32}


def test_a_language_model_of_a_size_ends_in_llama_cpp(given, writer, tmp_path):
    import gguf

    model, data = writer
    whole = (model / "model.safetensors").stat().st_size / 1e6
    done = hfc.shrink(model, data, output=tmp_path / "out", size_mb=whole / 6, runtime="llama.cpp", changes=QUICK)
    file = done.model / "model.gguf"
    assert done.is_met and done.reached == file.stat().st_size / 1e6 <= 1.1 * whole / 6
    result = json.loads((tmp_path / "out" / "shrink.json").read_text(encoding="utf-8"))
    assert result["runtime"] == "llama.cpp" and tmp_path / "out" / result["model"] == done.model
    made = (tmp_path / "out" / "run" / "stages").glob("*packed*/model")  # one of each pass
    norms = [AutoModelForCausalLM.from_pretrained(model).model.norm.weight.detach() for model in made]
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}["output_norm.weight"]
    assert any(torch.equal(torch.from_numpy(found.copy()), norm.float()) for norm in norms)


def test_an_embedder_of_a_size_ends_in_llama_cpp(given, tmp_path):
    pytest.importorskip("gguf")
    model = embedder(tmp_path / "embedder", pooling=Pooling("cls"))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text(i) + " " + text(i // 10) for i in range(60)), encoding="utf-8")
    data = {"source": str(texts), "max_length": 16}
    done = hfc.shrink(model, data, output=tmp_path / "out", size_mb=0.05, runtime="llama.cpp", changes=QUICK)
    assert done.is_met and done.reached == (done.model / "model.gguf").stat().st_size / 1e6


@pytest.mark.parametrize("what, message", [
    ("speedup", "models of causal-lm write token by token: ask for size_mb."),
    ("classifier", "llama.cpp runs models of causal-lm and embeddings here, not of sequence-classification"),
    ("embedder's time", "llama.cpp is not timed here: ask for size_mb, of the GGUF file, not for latency_ms"),
    ("family", "does not go to llama.cpp: format='gguf' knows language models of"),
])  # fmt: skip
def test_what_llama_cpp_cannot_do_is_told_before_anything_is_measured(what, message, given, writer, tmp_path):
    (model, data), wish, task = writer, {"size_mb": 1.0}, None
    if what == "speedup":
        wish = {"speedup": 2.0}
    elif what == "classifier":
        model, data = given
    elif what == "embedder's time":
        model, wish = embedder(tmp_path / "embedder"), {"latency_ms": 1.0}
    else:
        tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
        AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "gpt2")
        model, task = tmp_path / "gpt2", "causal-lm"
    with pytest.raises(RecipeError, match=re.escape(message)):
        hfc.shrink(model, data, output=tmp_path / "out", runtime="llama.cpp", task=task, **wish)
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_named(given, tmp_path):
    model, data = given
    with pytest.raises(RecipeError, match="'token-clasification' is not known. Did you mean 'token-classification'"):
        hfc.shrink(model, data, output=tmp_path / "out", size_mb=1.0, task="token-clasification")


@pytest.mark.parametrize("more, message", [
    (["--set", "num_train_epoch=1"], "the option 'num_train_epoch' is not known. Did you mean 'num_train_epochs'?"),
    (["--set", "num_train_epochs"], "--set takes OPTION=VALUE, such as num_train_epochs=1, got 'num_train_epochs'"),
    (["--set", "max_steps=0"], "max_steps must be at least 1"),
    (["--tokens", "0"], "tokens must lie between 1 and 64"), (["--tokens", "65"], "tokens must lie between 1 and 64"),
    (["--seed", "-1"], "seed must lie between 0 and"), (["--speedup", "inf"], "speedup is times as fast"),
    ([], "which hf_compress did not write there"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_measured(more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shrinking, "measured_times", lambda *args, **kwargs: pytest.fail("measured"))
    model, data = tiny_folder(tmp_path / "model"), reviews(tmp_path / "reviews.csv")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    wish = [] if "--speedup" in more else ["--speedup", "2"]
    command = ["shrink", str(model), "--data", str(data), "--output", str(tmp_path / ("o" if more else "mine"))]
    assert main([*command, *wish, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "o").exists()
