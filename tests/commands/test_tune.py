"""`hf-compress tune` measures the shapes it is told, or those of a model, each once."""

import pytest
from helpers import tiny_model

import hf_compress as hfc
from hf_compress.commands import tune
from hf_compress.commands.main import main


@pytest.fixture
def asked(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(tune, "tune_linear", lambda shapes, **options: calls.append((shapes, options)) or tmp_path)
    return calls


def test_shapes_are_those_given(asked, capsys):
    assert main(["tune", "--shapes", "4096x4096, 64x128", "--bits", "3"]) == 0
    assert asked == [([(4096, 4096), (64, 128)], {"bits": 3, "group_size": 128})]
    assert capsys.readouterr().out.startswith("table  ")


def test_shapes_are_those_of_the_packed_layers(asked, tmp_path):
    model = hfc.quantize(tiny_model("bert"), 4)
    model.save_pretrained(tmp_path / "packed")
    assert main(["tune", "--model", str(tmp_path / "packed")]) == 0
    width, neurons = model.config.hidden_size, model.config.intermediate_size
    assert set(asked[0][0]) == {(width, width), (neurons, width), (width, neurons)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model, whose layers are measured, or --shapes"),
        (["--shapes", "4096"], "such as 4096x4096, got '4096'"),
        (["--shapes", "0x64"], "got '0x64'"),
    ],
)
def test_mistakes(asked, arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err and not asked
