"""What users do with a model after loading it: train it, put adapters on it, load it without our import."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import TASKS, tiny_batch, tiny_model
from silence import logits
from transformers import Trainer, TrainingArguments

import hf_compress  # noqa: F401  registers the loader
from hf_compress.publishing.remote_code import remote_code
from hf_compress.surgery import prune_heads, prune_neurons


@pytest.fixture
def folder(tmp_path):
    model = prune_neurons(prune_heads(tiny_model("bert"), {0: [1], 1: range(4), 2: [0, 3]}), {1: range(48), 3: [0]})
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def examples(count: int = 8) -> list[dict]:
    batch = tiny_batch(tiny_model("bert"), batch=count, padding=False)
    return [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(batch["input_ids"])]


def test_the_stock_trainer_trains_saves_and_resumes_it(folder, tmp_path):
    args = dict(output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=4, seed=3,
                use_cpu=True, disable_tqdm=True, report_to="none", learning_rate=1e-2)  # fmt: skip
    trainer = Trainer(TASKS["classification"].from_pretrained(folder), TrainingArguments(**args),
                      train_dataset=examples())  # fmt: skip
    before = logits(trainer.model)
    trainer.train()
    assert not torch.equal(logits(trainer.model), before)
    checkpoint = TASKS["classification"].from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(checkpoint), logits(trainer.model.eval()))
    resumed = Trainer(TASKS["classification"].from_pretrained(tmp_path / "run" / "checkpoint-2"),
                      TrainingArguments(**args), train_dataset=examples())  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(resumed.model.eval()), logits(trainer.model.eval()))


def test_lora_on_top_trains_saves_loads_and_merges(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(TASKS["classification"].from_pretrained(folder), config).eval()
    expected = logits(model)
    assert not torch.equal(expected, logits(TASKS["classification"].from_pretrained(folder)))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(TASKS["classification"].from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = TASKS["classification"].from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)  # W x + B A x against (W + B A) x


def python(script: str, tmp_path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)


def test_remote_code_loads_it_without_an_import(folder, tmp_path):
    model = TASKS["classification"].from_pretrained(folder)
    for name, content in remote_code(model, (folder / "config.json").read_text(encoding="utf-8")).items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {
        "AutoModel": "modeling_hf_compress.BertModel",
        "AutoModelForSequenceClassification": "modeling_hf_compress.BertForSequenceClassification",
    }
    script = f"""
import sys
from transformers import AutoModelForSequenceClassification, AutoModel
assert "hf_compress" not in sys.modules
model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
"""
    result = python(script, tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert torch.equal(logits(TASKS["classification"].from_pretrained(tmp_path / "again")), logits(model))
