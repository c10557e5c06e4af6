"""Linear maps as products: the ranks follow from energy or a budget, and the model is saved, loaded and trained."""

import pytest
import torch
from distillation.training import trainer_of
from helpers import TASKS, default_task, tiny_batch, tiny_model
from silence import logits

import hf_compress as hfc
from hf_compress.layers.low_rank import LowRankLinear
from hf_compress.measuring.counting import multiply_adds, num_parameters
from hf_compress.model.anatomy import layer_maps
from hf_compress.pruning.low_rank import rank_of_energy, ranks_of_budget


def spectra(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 8), "b": (6, 10), "c": (12, 5)}
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    weights["a"][:, 2:] = weights["a"][:, :2] @ torch.randn(2, 6, generator=generator, dtype=torch.float64)  # rank 2
    return {name: torch.linalg.svdvals(weight) for name, weight in weights.items()}, shapes


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999])
def test_the_rank_is_the_smallest_that_holds_the_energy(energy):
    for spectrum in spectra()[0].values():
        squares = [float(s) ** 2 for s in spectrum]
        expected = next(r for r in range(1, 13) if sum(squares[:r]) >= energy * sum(squares) * (1 - 1e-12))
        assert rank_of_energy(spectrum, energy) == expected
    assert rank_of_energy(torch.zeros(4), energy) >= 1


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_a_budget_keeps_what_is_worth_most_for_what_it_costs(budget):
    found, shapes = spectra()
    ranks = ranks_of_budget(found, shapes, budget)
    size = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    assert size <= budget * sum(n * k for n, k in shapes.values())
    worth = {name: (s.square() / s.square().sum() / sum(shapes[name])).tolist() for name, s in found.items()}
    kept = [worth[name][i] for name, rank in ranks.items() for i in range(1, rank)]
    left = [worth[name][i] for name, rank in ranks.items() for i in range(rank, len(worth[name]))]
    assert not kept or min(kept) >= max(left)
    assert ranks["a"] <= 2  # of rank 2: nothing is spent on what is not there
    with pytest.raises(ValueError, match="budget=0.01 is too small"):
        ranks_of_budget(found, shapes, 0.01)


@pytest.mark.parametrize("family", ["bert", "llama", "bart", "modernbert"])
@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.5}, {"budget": 0.3}], ids=str)
def test_the_maps_are_the_nearest_products_and_come_back_bit_for_bit(family, options, tmp_path):
    model = tiny_model(family)
    dense = {name: module.weight.detach().clone() for name, module in layer_maps(model).items()}
    size, products = num_parameters(model), multiply_adds(model, tiny_batch(model))
    assert hfc.factorise(model, **options) is model
    maps = layer_maps(model)
    ranks = {name: m.rank for name, m in maps.items() if isinstance(m, LowRankLinear)}
    assert ranks
    for name, rank in ranks.items():
        error = (maps[name].dense_weight() - dense[name]).square().sum()
        torch.testing.assert_close(error, torch.linalg.svdvals(dense[name])[rank:].square().sum(), rtol=1e-4, atol=1e-7)
    saved = sum(dense[name].numel() - rank * sum(dense[name].shape) for name, rank in ranks.items())
    assert size - num_parameters(model) == saved > 0
    assert multiply_adds(model, tiny_batch(model)) < products
    model.save_pretrained(tmp_path)
    loaded, info = TASKS[default_task(family)].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    assert {n: m.rank for n, m in layer_maps(loaded).items() if isinstance(m, LowRankLinear)} == ranks


def test_a_model_of_low_rank_is_what_it_was():
    model = tiny_model("bert").double()
    for module in layer_maps(model).values():
        module.weight.data = module.weight.data[:, :3] @ torch.randn(3, module.in_features, dtype=torch.float64)
    before = logits(model)
    hfc.factorise(model, energy=1 - 1e-12)
    assert {m.rank for m in layer_maps(model).values()} == {3}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family, keep", [("bert", [3, 1]), ("llama", [2]), ("bart", [1, 2])], ids=str)
def test_layers_of_a_factorised_model_are_cut_and_their_ranks_go_with_them(family, keep, tmp_path):
    model = hfc.factorise(tiny_model(family), energy=0.5)  # ranks that differ from layer to layer
    layers = [layer.name for layer in hfc.anatomy(model).layers]
    ranks = [[m.rank for n, m in layer_maps(model).items() if n.startswith(f"{layers[i]}.")] for i in keep]
    hfc.prune_layers(model, keep)
    model.save_pretrained(tmp_path)
    loaded, info = TASKS[default_task(family)].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    found = [layer.name for layer in hfc.anatomy(loaded).layers]
    assert [[m.rank for n, m in layer_maps(loaded).items() if n.startswith(f"{one}.")] for one in found] == ranks
    # the same numbers lie elsewhere: products of odd ranks go by the memory's alignment, to 1 in the last bit
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    hfc.prune_layers(loaded, [0, 1] if family == "bart" else [0]).save_pretrained(tmp_path / "again")
    again = TASKS[default_task(family)].from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(loaded), rtol=0, atol=1e-6)


def test_it_is_distilled_and_its_tables_are_factorised_too(tmp_path):
    teacher = tiny_model("bert")
    student = hfc.factorise_embeddings(hfc.factorise(tiny_model("bert"), rank=4), 8)
    trainer = trainer_of(hfc.DistillationTrainer, tmp_path, student, teacher, alpha=1.0)
    trainer.train()
    student.save_pretrained(tmp_path / "student")
    again = TASKS["classification"].from_pretrained(tmp_path / "student")
    assert torch.equal(logits(again), logits(student.eval()))


def test_what_has_no_such_form_is_refused_and_nothing_changes():
    model = tiny_model("bert")
    before = logits(model)
    for options, message in (
        ({}, "Give one of rank, energy and budget"),
        ({"rank": 2, "budget": 0.5}, "Give one of rank, energy and budget"),
        ({"rank": 0}, "rank is 1 or more"),
        ({"energy": 1.5}, "shares between 0 and 1"),
        ({"budget": 0.001}, "budget=0.001 is too small"),
        ({"rank": 32}, "no map would get smaller"),
        ({"rank": 2, "skip_modules": ["nowhere"]}, "no linear map in the layers is called 'nowhere'"),
        ({"rank": 2, "skip_modules": [".*"]}, "no plain linear map left"),
    ):
        with pytest.raises(ValueError, match=message):
            hfc.factorise(model, **options)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="A Conv1D cannot be made a product of factors"):
        hfc.factorise(tiny_model("gpt2"), rank=2)
    with pytest.raises(ValueError, match="quantized or block-sparse"):
        hfc.factorise(hfc.quantize(tiny_model("bert"), 8), rank=2)
    with pytest.raises(ValueError, match="is no plain|low rank|LowRank"):
        hfc.prune_heads(hfc.factorise(tiny_model("bert"), rank=2), {0: [1]})
