"""A stage that works together ends in the model that was trained: what is saved answers as it did before `finish`."""

import copy
import random

import pytest
import torch
from helpers import tiny_batch
from recipe_run import TRAIN, reviews, tiny_folder
from silence import logits
from training.test_finish import BOUND, GROUP, combinations
from training.test_finish import QAT as QAT_PIECES
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


PIECES = {  # those of tests/training/test_finish.py
    "heads": {"method": "heads", "sparsity": 0.4, **SCHEDULE},
    "gates": {"method": "head-gates", "l0": 4.0, "gate_rate": 3000.0, "initial": 0.1, "end": 0.7},
    "neurons": {"method": "neurons", "sparsity": 0.4, **SCHEDULE},
    "layers": {"method": "layers", "share": 0.5},
    "blocks": {"method": "blocks", "sparsity": 0.6, "block_size": 8, **SCHEDULE},
}


def stages_of(family, pieces):
    """Stages of one `together`, in an order of chance, with bits and symmetry drawn; the same each time."""
    draw = random.Random(repr((family, pieces)))
    teaches, unit = draw.choice([{}, {"hints": "1:2"}]), GROUP if "groups" in pieces else 1
    stages = [{"distil": {**teaches, **TRAIN}} if "distillation" in pieces else {"fine-tune": TRAIN}]
    for piece in pieces:
        if piece in PIECES:
            stages.append({"prune": {**PIECES[piece], **({"multiple_of": unit} if piece == "neurons" else {})}})
    if asked := [piece for piece in pieces if piece in QAT_PIECES]:
        drawn = {"embedding_bits": None} if family == "bart" else {}  # several modules share the table
        drawn |= {"bits": draw.choice([2, 3, 4]), "symmetric": draw.random() < 0.3, "heads_too": draw.random() < 0.5}
        stages.append({"quantize": {**QAT, **drawn, **{k: v for piece in asked for k, v in QAT_PIECES[piece].items()}}})
    draw.shuffle(stages)
    return stages


def batch_of(model) -> dict:
    """Texts alone; of BART's classifier, which reads its decoder at the end of each, with that end."""
    batch = tiny_batch(model)
    if batch.pop("decoder_input_ids", None) is not None:
        last = batch["attention_mask"].sum(1, keepdim=True) - 1
        batch["input_ids"].scatter_(1, last, model.config.eos_token_id)
    return batch


def saved(stages, model, folder, monkeypatch):
    """The model that a recipe saves, of which the logits are those of the trained one; how many weights that had."""
    monkeypatch.setenv("HF_COMPRESS_CPU", "exact")
    seen, finish = [], state.finish

    def watched(model):
        trained = copy.deepcopy(model).double().eval()
        seen.append((sum(p.numel() for p in model.parameters()), logits(trained, batch_of(trained))))
        return finish(model)

    monkeypatch.setattr(state, "finish", watched)
    data = {"source": str(reviews(folder / "r.csv")), "max_length": 16}
    output = Recipe(stages, model=model, data=data).run(folder / "out").output
    ((size, expected),) = seen
    loaded = AutoModelForSequenceClassification.from_pretrained(output / "model", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded, batch_of(loaded)), expected, rtol=0, atol=BOUND)
    return loaded, size


@pytest.mark.parametrize("name", TOGETHER)
def test_a_stage_together_saves_the_trained_model(name, tmp_path, monkeypatch):
    stages = [{"together": TOGETHER[name]}]
    stages = [{"fine-tune": TRAIN}, *stages] if name.startswith("blocks") else stages
    model, size = saved(stages, tiny_folder(tmp_path / "model"), tmp_path, monkeypatch)
    assert sum(p.numel() for p in model.parameters()) < size and model.config.quantization_config["bits"]
    if name.startswith("blocks"):
        assert {e["format"] for e in model.config.quantization_config["sparsity"].values()} == {"packed"}


@pytest.mark.long
@pytest.mark.parametrize("pieces", [*combinations(2), *combinations(3)], ids="+".join)
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "bart"])
def test_every_pair_and_triple_is_saved_as_it_was_trained(family, pieces, tmp_path, monkeypatch):
    ends = {"eos_token_id": 3, "pad_token_id": 0} if family == "bart" else {}  # as the tokenizer has them
    source = tiny_folder(tmp_path / "model", family, task="classification", **ends)
    model, size = saved([{"together": stages_of(family, pieces)}], source, tmp_path, monkeypatch)
    if set(pieces) & set(PIECES):
        assert sum(p.numel() for p in model.parameters()) < size
    if set(pieces) & set(QAT_PIECES):
        assert model.config.quantization_config["bits"]
