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
from hf_compress.training.pieces import forms_of, pieces_of

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


def train(family: str, pieces: tuple[str, ...], folder, *, kind: type[Trainer] | None = None, **options) -> Trained:
    """Three steps of `family` with these pieces, added in an order of chance; not finished."""
    chosen = [piece for piece in pieces if piece in QAT]
    depth = {"distilbert": "n_layers"}.get(family, "num_hidden_layers")
    model = tiny_model(family, **({} if family == "bart" else {depth: 2}))
    if chosen:
        asked = {"num_groups": None} | {key: value for piece in chosen for key, value in QAT[piece].items()}
        embedding_bits = None if family == "bart" else 8  # a head is tied to the table
        hfc.prepare_qat(model, 4, embedding_bits=embedding_bits, range_method="minmax", **asked)
    unit = GROUP if "groups" in chosen else 1
    callbacks = [PRUNING[piece](unit) for piece in pieces if piece in PRUNING]
    callbacks += [hfc.QuantizationAware(refresh_steps=2)] if chosen else []
    random.Random(repr((family, pieces))).shuffle(callbacks)
    data, extra = rows(12, kind=FAMILIES[family]), {}
    args = {"max_steps": 3, "learning_rate": 1e-2, **options}
    if kind is None and "distillation" in pieces:
        kind, args["kind"] = hfc.DistillationTrainer, hfc.DistillationConfig
        args.setdefault("finish_at_end", False)
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


COVER = {  # with all triples of each, every pair is there; each family meets every piece
    "bert": [("distillation", "heads", "neurons", "layers", "static", "learned"),
             ("gates", "blocks", "per-token", "bundles", "learned")],
    "distilbert": [("distillation", "gates", "neurons", "blocks", "per-token", "groups"),
                   ("heads", "layers", "bundles", "learned")],
    "llama": [("heads", "gates", "neurons", "blocks", "layers", "static", "bundles"),
              ("distillation", "learned", "per-token", "neurons", "heads"), ("distillation", "blocks", "heads")],
    "bart": [("distillation", "gates", "layers", "per-token", "learned", "groups"),
             ("heads", "neurons", "blocks", "static", "groups"), ("distillation", "bundles", "static")],
}  # fmt: skip
CASES = [(family, pieces) for family, sets in COVER.items() for pieces in sets]


def test_the_cover_has_every_pair():
    found = {pair for _, pieces in CASES for pair in itertools.combinations(sorted(pieces), 2)}
    assert {tuple(sorted(pair)) for pair in combinations(2)} <= found
    for family in FAMILIES:
        missing = set(PIECES) - {piece for sets in COVER[family] for piece in sets}
        assert missing <= {piece for pair in EITHER for piece in pair}, family


@pytest.mark.parametrize(("family", "pieces"), CASES, ids=lambda value: value if isinstance(value, str) else None)
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
