"""One projection for maps that share an input: the least squares of its equation, stored once, and all that follows."""

import copy

import pytest
import torch
from distillation.training import trainer_of
from helpers import TASKS, default_task, tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from safetensors import safe_open
from silence import logits

import hf_compress as hfc
from hf_compress.layers.low_rank import SharedLowRankLinear
from hf_compress.measuring.counting import multiply_adds, num_parameters
from hf_compress.model.anatomy import anatomy, layer_maps
from hf_compress.model.weights import float_weights
from hf_compress.recipe.stages import read_stages


def own(model):
    return {name: module.weight.detach().clone() for name, module in layer_maps(model).items()}


def test_the_tables_solve_the_least_squares_of_a_projection_that_is_the_best():
    """Eq. 65 for each map; and no other projection, such as that of the first map alone (eq. 64), has less error."""
    model = tiny_model("llama").double()
    attention, dense = anatomy(model).attentions[1], own(model)
    names = [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkv"]
    hfc.factorise(model, rank=5, shared=True)
    P = attention.query.projection
    for module, name in zip((attention.query, attention.key, attention.value), names, strict=True):
        assert module.projection is P
        expected = torch.linalg.lstsq(P.detach(), dense[name].T).solution.T  # argmin over Y of |Y P^T - W|^2
        torch.testing.assert_close(module.table.detach(), expected, rtol=0, atol=1e-10)
    stack = torch.cat([dense[name] for name in names])
    error = sum((layer_maps(model)[name].dense_weight() - dense[name]).square().sum() for name in names)
    torch.testing.assert_close(error, torch.linalg.svdvals(stack)[5:].square().sum())  # Eckart and Young
    first = torch.linalg.svd(dense[names[0]]).Vh[:5].T
    assert error < (stack @ first @ first.T - stack).square().sum()


@pytest.mark.parametrize("family", ["bert", "llama", "bart", "deberta-v2"])
@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.4}, {"budget": 0.3}], ids=str)
def test_it_is_stored_once_and_comes_back(family, options, tmp_path):
    model = tiny_model(family)
    dense, size = own(model), num_parameters(model)
    hfc.factorise(model, **options, shared=True)
    shared = {name: m for name, m in layer_maps(model).items() if isinstance(m, SharedLowRankLinear)}
    assert shared and size > num_parameters(model)
    own_factors = [p for m in layer_maps(model).values() for p in m.parameters(recurse=False) if p.dim() == 2]
    assert size - num_parameters(model) == sum(w.numel() for w in dense.values()) - sum(p.numel() for p in own_factors)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert not stored & {f"{name}.projection" for name in shared} and {f"{name}.table" for name in shared} <= stored
    loaded, info = TASKS[default_task(family)].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    maps = layer_maps(loaded)
    assert all(maps[name].projection is maps[name].owner[0].projection for name in shared)
    # the same numbers lie elsewhere: products of odd ranks go by the memory's alignment, to 1 in the last bit
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    weights = float_weights(loaded)
    assert all(torch.equal(weights[f"{n}.weight"], m.table @ m.projection.T) for n, m in shared.items())


def test_copies_hold_together_and_layers_are_cut(tmp_path):
    model = hfc.factorise(tiny_model("bert"), energy=0.4, shared=True)
    twin = copy.deepcopy(model)
    attention = anatomy(twin).attentions[2]
    assert attention.key.projection is attention.query.projection
    assert attention.key.projection is not anatomy(model).attentions[2].key.projection
    hfc.prune_layers(twin, [2, 1]).save_pretrained(tmp_path)
    loaded = TASKS["classification"].from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=0, atol=1e-6)
    assert [a.key.owner[0] is a.query for a in anatomy(loaded).attentions] == [True, True]


def test_it_is_distilled_and_all_maps_teach_the_projection(tmp_path):
    teacher, written = tiny_model("bert"), {"prune": {"method": "low-rank", "rank": 4, "shared": "true"}}
    (stage,) = read_stages([written])
    student, _ = stage.own.apply(tiny_model("bert"), None, None)
    attention = anatomy(student).attentions[0]
    student(input_ids=torch.tensor([[7, 8, 9]])).logits.sum().backward()
    x, gradients = torch.randn(5, 32), []
    for module in (attention.query, attention.key, attention.value):
        attention.query.projection.grad = None
        module(x).sum().backward()
        gradients.append(attention.query.projection.grad.abs().sum())
    assert min(gradients) > 0
    trainer_of(hfc.DistillationTrainer, tmp_path, student, teacher, alpha=1.0).train()
    student.eval().save_pretrained(tmp_path / "student")
    again = TASKS["classification"].from_pretrained(tmp_path / "student")
    assert torch.equal(logits(again), logits(student))
    smaller = hfc.make_student(student, num_hidden_layers=2)  # of what it computes with
    dense = [attention.key.dense_weight() for attention in anatomy(student).attentions]
    assert all(any(torch.equal(a.key.weight, one) for one in dense) for a in anatomy(smaller).attentions)


def test_what_is_stored_once_is_multiplied_by_each():
    model, apart = (hfc.factorise(tiny_model("bert"), rank=4, shared=shared) for shared in (True, False))
    assert multiply_adds(model, tiny_batch(model)) == multiply_adds(apart, tiny_batch(model))
    assert num_parameters(apart) - num_parameters(model) == 4 * 2 * 32 * 4  # layers, maps, width, rank


def test_what_cannot_be_shared_is_refused(tmp_path):
    model = hfc.factorise(tiny_model("bert"), rank=4, shared=True)
    with pytest.raises(ValueError, match="share their projections: call hfc.factorise without shared=True"):
        _ = OurTrainer(model, arguments(tmp_path), callbacks=[hfc.RankGates()]).training_state
    key, query = (f"encoder.layer.0.attention.self.{name}" for name in ("key", "query"))
    cases = {"encoder.layer.0.output.dense": "cannot share the projection of", "nowhere": "cannot share",
             key: "cannot share", 3: "must share with a module, by its name, got 3"}  # fmt: skip
    model.save_pretrained(tmp_path / "bad")
    for other, message in cases.items():
        record = copy.deepcopy(model.config.quantization_config)
        assert record["structure"]["shared"][key] == query
        record["structure"]["shared"][key] = other
        record.pop("digest")
        config = copy.deepcopy(model.config)
        config.quantization_config = record
        config.save_pretrained(tmp_path / "bad")
        with pytest.raises(ValueError, match=message):
            TASKS["classification"].from_pretrained(tmp_path / "bad")
