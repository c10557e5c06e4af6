"""What training leaves open is finished exactly: whatever was combined, in whatever order it came to the model."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch
from distillation.data import rows
from helpers import tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from silence import logits
from torch import nn
from transformers import PreTrainedModel, Trainer

import hf_compress as hfc
from hf_compress.model.unfinished import forms_of, pieces_of
from hf_compress.recipe.quantizing import linear_maps

QUICK = {"begin": 0.0, "end": 0.7, "num_updates": 1}
FAMILIES = {"bert": "classification", "distilbert": "classification", "llama": "clm", "bart": "seq2seq"}
GROUP = 8  # columns; a head of the tiny models has 8 too
QAT = {  # what a piece asks of `prepare_qat`
    "static": {},
    "per-token": {"dynamic_activations": True},
    "learned": {"learned_steps": True},
    "bundles": {"num_groups": 8},
    "groups": {"group_size": GROUP},
}
PRUNING = {
    "heads": lambda unit: hfc.HeadPruning(0.4, **QUICK),
    "gates": lambda unit: hfc.HeadGates(4.0, gate_rate=3000.0, initial=0.1, end=0.7),
    "neurons": lambda unit: hfc.NeuronPruning(0.4, multiple_of=unit, **QUICK),
    "layers": lambda unit: hfc.LayerPruning(0.2, share=0.5),
    "blocks": lambda unit: hfc.BlockPruning(0.5, block_size=8, method="movement", **QUICK),
}
PIECES = ("distillation", *PRUNING, *QAT)
EITHER = (("static", "per-token"), ("bundles", "groups"))  # of inputs one range or many; of weights rows or columns
BOUND = 1e-9  # of a logit, in float64: what sums in another order can differ by, many times over
FLOAT32 = 2e-2  # of the largest logit, in float32: an input that lies between two of 255 levels may fall to either side


def combinations(size: int) -> list[tuple[str, ...]]:
    """All sets of so many pieces, but for those that are two answers to one question."""
    return [c for c in itertools.combinations(PIECES, size) if not any(set(pair) <= set(c) for pair in EITHER)]


@dataclass
class Trained:
    """A model that training is through with, and the callbacks that took part."""

    model: PreTrainedModel
    callbacks: list = field(default_factory=list)


def details(family: str, pieces: tuple[str, ...]) -> tuple[dict, dict, dict]:
    """What the pieces leave open, drawn: of `prepare_qat`, of its callback, of a distillation. The same each time."""
    draw = random.Random(repr((family, pieces)))
    qat = {"symmetric": draw.random() < 0.3, "range_method": draw.choice(["minmax", "mse"])}
    if not {"static", "per-token"} & set(pieces):
        qat["activation_bits"] = draw.choice([8, None])
    callback = {"refresh_steps": 2, "start_bits": draw.choice([None, 8]), "lowering_ratio": 0.5}
    distillation = draw.choice([{}, {"hints": "1:2"}, {"hints": "0:0,2:1", "temperature": 4.0}])
    return {"bits": draw.choice([2, 3, 4]), "heads_too": draw.random() < 0.5, **qat}, callback, distillation


def train(family: str, pieces: tuple[str, ...], folder, *, kind: type[Trainer] | None = None, **options) -> Trained:
    """Three steps of `family` with these pieces, added in an order of chance; not finished."""
    qat, aware, distillation = details(family, pieces)
    chosen = [piece for piece in pieces if piece in QAT]
    depth = {"distilbert": "n_layers"}.get(family, "num_hidden_layers")
    model = tiny_model(family, **({} if family == "bart" else {depth: 2}))
    if chosen:
        bits, heads_too = qat.pop("bits"), qat.pop("heads_too")
        asked = {"num_groups": None} | qat | {key: value for piece in chosen for key, value in QAT[piece].items()}
        embedding_bits = None if family == "bart" else 8  # a head is tied to the table
        hfc.prepare_qat(model, linear_maps(model, bits) if heads_too else bits, embedding_bits=embedding_bits, **asked)
    unit = GROUP if "groups" in chosen else 1
    callbacks = [PRUNING[piece](unit) for piece in pieces if piece in PRUNING]
    callbacks += [hfc.QuantizationAware(**aware)] if chosen else []
    random.Random(repr((family, pieces))).shuffle(callbacks)
    data, extra = rows(12, kind=FAMILIES[family]), {}
    args = {"max_steps": 3, "learning_rate": 1e-2, **options}
    if kind is None and "distillation" in pieces:
        kind, args["kind"] = hfc.DistillationTrainer, hfc.DistillationConfig
        args = {"finish_at_end": False, **distillation, **args}
        extra["teacher_model"] = tiny_model(family, seed=3)
    trainer = (kind or OurTrainer)(model, arguments(folder, **args), train_dataset=data, callbacks=callbacks, **extra)
    trainer.train()
    return Trained(model.eval(), callbacks)


def kinds_of(model: nn.Module) -> set[str]:
    return {kind.__name__ for module in model.modules() for kind in type(module).__mro__}


def assert_finished_exactly(family: str, pieces: tuple[str, ...], folder, monkeypatch) -> None:
    """Logits in float32 and in float64, before and after saving, against the model as training left it."""
    monkeypatch.setenv("HF_COMPRESS_CPU", "exact")
    model = train(family, pieces, folder).model
    batch = tiny_batch(model)
    single, expected = logits(model, batch), logits(model.double(), batch)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert hfc.finish(model) is model
    assert not pieces_of(model) and not forms_of(model)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=BOUND)
    if set(pieces) & set(PRUNING):
        assert sum(parameter.numel() for parameter in model.parameters()) < size
    if set(pieces) & set(QAT):
        assert "PackedLinear" in kinds_of(model) and "BlockSparseLinear" not in kinds_of(model)
        assert ("PackedBlocksLinear" in kinds_of(model)) == ("blocks" in pieces)
    elif "blocks" in pieces:
        assert "BlockSparseLinear" in kinds_of(model)
    model.save_pretrained(folder / "finished")
    loaded = type(model).from_pretrained(folder / "finished", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=BOUND)
    loaded = type(model).from_pretrained(folder / "finished", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded, batch), single, rtol=0, atol=FLOAT32 * float(single.abs().max()))


ALL = {"distillation", *PRUNING, "learned"}
HALVES = (ALL - {"gates", "layers", "learned"}, {"gates", "layers", "learned"})


def cover(turn: int) -> list[tuple[str, ...]]:
    """Four sets in which every pair is found; another of them has everything at each `turn`."""
    inputs, weights = EITHER[0][:: 1 - 2 * (turn % 2)], EITHER[1][:: 1 - 2 * (turn // 2 % 2)]
    sets = [ALL | {inputs[0], weights[0]}, HALVES[0] | {inputs[1], weights[1]},
            HALVES[1] | {inputs[0], weights[1]}, HALVES[1] | {inputs[1], weights[0]}]  # fmt: skip
    return [tuple(piece for piece in PIECES if piece in chosen) for chosen in sets]


CASES = [(family, pieces) for turn, family in enumerate(FAMILIES) for pieces in cover(turn)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cover_has_every_pair(family):
    found = {pair for name, pieces in CASES if name == family for pair in itertools.combinations(pieces, 2)}
    assert set(combinations(2)) <= found


@pytest.mark.parametrize(("family", "pieces"), CASES, ids=lambda value: value if isinstance(value, str) else len(value))
def test_the_finished_model_is_the_trained_one(family, pieces, tmp_path, monkeypatch):
    assert_finished_exactly(family, pieces, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("pieces", combinations(2), ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_is_finished_exactly(family, pieces, tmp_path, monkeypatch):
    assert_finished_exactly(family, pieces, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("pieces", combinations(3), ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_triple_is_finished_exactly(family, pieces, tmp_path, monkeypatch):
    assert_finished_exactly(family, pieces, tmp_path, monkeypatch)
