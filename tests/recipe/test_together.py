"""A stage that works together ends in the model that was trained: what is saved answers as it did before `finish`."""

import copy

import pytest
import torch
from helpers import tiny_batch
from recipe_run import TRAIN, reviews, tiny_folder
from silence import logits
from transformers import AutoModelForSequenceClassification

from hf_compress.recipe import Recipe
from hf_compress.training import state

SCHEDULE = {"begin": 0.0, "end": 0.7, "num_updates": 1}
QAT = {"method": "qat", "bits": 4, "range_method": "minmax"}
TOGETHER = {
    "learned-bundles": [
        {"fine-tune": TRAIN},
        {"prune": {"method": "heads", "sparsity": 0.4, **SCHEDULE}},
        {"prune": {"method": "neurons", "sparsity": 0.4, **SCHEDULE}},
        {"quantize": {**QAT, "learned_steps": True, "num_groups": 8}},
    ],
    "blocks-per-token": [
        {"quantize": {**QAT, "dynamic_activations": True}},
        {"prune": {"method": "blocks", "sparsity": 0.6, "block_size": 8, **SCHEDULE}},
        {"distil": {"hints": "1:2", "num_hidden_layers": 2, **TRAIN}},
    ],
    "gates-layers-groups": [
        {"prune": {"method": "layers", "share": 0.5}},
        {"prune": {"method": "head-gates", "l0": 4.0, "gate_rate": 3000.0, "initial": 0.1}},
        {"quantize": {**QAT, "group_size": 8, "heads_too": True}},
        {"fine-tune": TRAIN},
    ],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_a_stage_together_saves_the_trained_model(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_COMPRESS_CPU", "exact")
    seen, finish = [], state.finish

    def watched(model):
        trained = copy.deepcopy(model).double().eval()
        seen.append((sum(p.numel() for p in model.parameters()), logits(trained, tiny_batch(trained))))
        return finish(model)

    monkeypatch.setattr(state, "finish", watched)
    data = {"source": str(reviews(tmp_path / "r.csv")), "max_length": 16}
    stages = [{"fine-tune": TRAIN}, {"together": TOGETHER[name]}] if name.startswith("blocks") else [
        {"together": TOGETHER[name]}
    ]  # fmt: skip
    output = Recipe(stages, model=tiny_folder(tmp_path / "model"), data=data).run(tmp_path / "out").output
    ((size, expected),) = seen
    model = AutoModelForSequenceClassification.from_pretrained(output / "model", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(model, tiny_batch(model)), expected, rtol=0, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) < size and model.config.quantization_config["bits"]
    if name.startswith("blocks"):
        assert {e["format"] for e in model.config.quantization_config["sparsity"].values()} == {"packed"}
