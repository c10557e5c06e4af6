"""`accelerate launch` runs a recipe on two processes, and what comes out is there once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_run import QUICK, TRAIN, reviews, tiny_folder
from transformers import AutoModelForSequenceClassification

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_two_processes_run_a_recipe(tmp_path):
    stages = [{"fine-tune": TRAIN}, {"prune": {"method": "structure", "layers": 0.5}},
              {"together": [{"distil": {"teacher": "fine-tune", **TRAIN}}, {"quantize": {"method": "qat", "bits": 8}}]},
              {"evaluate": QUICK}]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"data": {"max_length": 16}, "stages": stages}), encoding="utf-8"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines",
               "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
               "hf_compress.commands.main", "run", str(tmp_path / "recipe.yaml"), "--model",
               str(tiny_folder(tmp_path / "start")), "--data", str(reviews(tmp_path / "r.csv")), "--output",
               str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line[:2] in ("1/", "2/", "3/", "4/")]
    assert [line.split()[1] for line in said] == ["fine-tune", "structure", "together", "evaluate"], "told once"
    assert done.stdout.count("report.html") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        "model", "recipe.yaml", "report.csv", "report.html", "report.json", "report.md", "report.png", "stages",
        "stages.json"]  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.num_hidden_layers == 2 and model.config.quantization_config["bits"]
