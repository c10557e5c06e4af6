"""The command line takes every option, says what is wrong in a sentence, and ends with the right code."""

import json
import subprocess
import sys

import pytest
import yaml
from recipe_run import QUICK, TRAIN, reviews, tiny_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, BertModel

from hf_compress.commands.main import VERBS, main
from hf_compress.recipe import ready_recipes


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    tiny_folder(folder / "model")
    reviews(folder / "reviews.csv")
    return folder


def options(values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value).lower())]


def test_run_takes_a_file_and_changes_from_the_command_line(work, capsys):
    recipe = {"stages": [{"fine-tune": TRAIN}, {"quantize": {"bits": 8}}, {"evaluate": QUICK}]}
    (work / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = ["run", str(work / "mine.yaml"), "--model", str(work / "model"), "--data", str(work / "reviews.csv"),
               "--output", str(work / "out"), "--max-length", "16", "--set", "fine-tune.max_steps=2"]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "accuracy" in printed and str(work / "out" / "model") in printed
    report = json.loads((work / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["command"].startswith("hf-compress run mine.yaml --model model --data reviews.csv")
    assert (
        yaml.safe_load((work / "out" / "recipe.yaml").read_text(encoding="utf-8"))["stages"][0]["fine-tune"][
            "max_steps"
        ]
        == 2
    )
    assert main([*command, "--set", "tune.max_steps=2"]) == 2
    assert "there is no stage 'tune', only fine-tune, rtn, evaluate" in capsys.readouterr().err


def test_distill_prune_and_quantize_are_recipes_of_one_stage(work, capsys):
    shared = ["--data", str(work / "reviews.csv"), "--max_length", "16"]
    distill = ["distill", "--model", str(work / "model"), "--num-hidden-layers", "2", "--alpha", "0.5", *shared,
               "--output", str(work / "distilled"), *options(TRAIN)]  # fmt: skip
    assert main(distill) == 0, capsys.readouterr().err
    model = str(work / "distilled" / "model")
    prune = ["prune", "--method", "structure", "--heads=0.5", "--model", model, "--output", str(work / "pruned")]
    assert main([*prune, *shared]) == 0, capsys.readouterr().err
    model = str(work / "pruned" / "model")
    quantize = ["quantize", "--method", "gptq", "--bits", "4", "--desc_act", "--calibration_examples", "8", "--model",
                model, "--output", str(work / "packed")]  # fmt: skip
    assert main([*quantize, *shared]) == 0, capsys.readouterr().err
    packed = AutoModelForSequenceClassification.from_pretrained(work / "packed" / "model")
    assert packed.config.num_hidden_layers == 2
    assert packed.config.quantization_config.keys() >= {"structure", "bits"}


@pytest.mark.parametrize("verb", ["fine-tune", "finetune"])
def test_fine_tune_gives_a_model_the_head_that_a_student_then_follows(verb, work, capsys):
    BertModel.from_pretrained(work / "model").save_pretrained(work / "bare")
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(work / "bare")
    shared = ["--data", str(work / "reviews.csv"), "--max_length", "16", *options(TRAIN)]
    tuned = ["--model", str(work / "bare"), "--output", str(work / verb), "--evaluate", *shared]
    assert main([verb, *tuned]) == 0, capsys.readouterr().err
    assert "accuracy" in capsys.readouterr().out
    teacher = str(work / verb / "model")
    assert BertForSequenceClassification.from_pretrained(teacher).config.num_labels == 2
    shared += ["--num-hidden-layers", "1", "--output", str(work / f"{verb}-student")]
    assert main(["distill", "--model", teacher, *shared]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: hf-compress {verb}" in printed and all(len(line) < 400 for line in printed.splitlines())


def test_help_shows_what_matters_and_help_all_everything(capsys):
    assert main(["distill", "--method", "tinybert", "--help"]) == 0
    short = capsys.readouterr().out
    assert "--intermediate_share" in short and "--learning_rate" in short and "--fsdp" not in short
    assert main(["distill", "--method", "tinybert", "--help-all"]) == 0
    assert "--fsdp" in capsys.readouterr().out
    assert main(["quantize", "--method", "gptq", "--help"]) == 0
    assert "share of the mean Hessian diagonal added to it" in " ".join(capsys.readouterr().out.split())
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb}" in printed for verb in VERBS)


MISTAKES = [
    (["nonsense"], "The verb 'nonsense' is not known"),
    (["distil", "--output", "o", "--alhpa", "0.5"], "--alhpa is not known. Did you mean --alpha?"),
    (["distill", "--method", "tinybret", "--output", "o"], "Did you mean 'tinybert'?"),
    (["fine-tune", "--output", "o", "--method", "pkd"], "the method 'pkd' is not known"),
    (["quantize", "--output", "o", "--bits", "many", "--model", "m", "--data", "d"], "bits must be a whole number"),
    (["prune", "--method", "heads"], "the following arguments are required: --output"),
    (["run", "classifier-cpus", "--output", "o"], "Did you mean 'classifier-cpu'?"),
    (["run", "missing.yaml", "--output", "o"], "There is no recipe missing.yaml: the file does not exist."),
    (["run", "classifier-cpu", "--output", "o", "--data", "d"], "names no model"),
    (["run", "classifier-cpu", "--output", "o", "--model", "/nowhere/at/all", "--data", "d"], "There is no model"),
]  # fmt: skip


@pytest.mark.parametrize("command, message", MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_a_mistake_is_one_sentence_and_code_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and "Traceback" not in printed


def test_wrong_columns_and_unwritable_output_are_mistakes(work, tmp_path, capsys):
    start = ["quantize", "--model", str(work / "model"), "--data", str(work / "reviews.csv")]
    assert main([*start, "--output", str(tmp_path / "o"), "--label_column", "stars"]) == 2
    assert "needs the column 'stars'; it has ['text', 'label']" in capsys.readouterr().err
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main([*start, "--output", str(tmp_path / "file" / "o")]) == 2
    assert "Nothing can be written to" in capsys.readouterr().err


def test_a_failure_that_is_not_the_users_is_code_1(work, capsys, monkeypatch, tmp_path):
    from hf_compress.recipe.training import Change

    monkeypatch.setattr(Change, "run", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    command = ["quantize", "--model", str(work / "model"), "--data", str(work / "reviews.csv"), "--output",
               str(tmp_path)]  # fmt: skip
    assert main(command) == 1
    assert capsys.readouterr().err.endswith("hf-compress: RuntimeError: out of memory\n")


def test_ready_recipes_can_be_read():
    from hf_compress.recipe import Recipe

    assert set(ready_recipes()) == {
        "classifier-cpu", "classifier-cpu-together", "classifier-tiny", "few-labels", "llm-2bit", "llm-3bit",
        "llm-3bit-mixed", "llm-4bit", "sparse-blocks",
    }  # fmt: skip
    for name in ready_recipes():
        assert Recipe.from_yaml(name).stages


def test_the_command_starts_quickly():
    code = "import sys; from hf_compress.commands.main import main; main(['--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "hf-compress VERB" in loaded and "datasets" not in loaded.split()
