"""What FSDP2 cuts over the ranks is pruned and quantized as what is whole: the same losses, masks, finished models."""

import pytest
import torch
import torch.distributed as dist
from checks.cpu_fsdp import share_weights
from machine import needs_fork, ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from trust.compositions import COMPOSITIONS, Composition
from trust.test_processes import OPTIONS, Masks, assert_close, losses_of
from trust.trainers import build, run

import hf_compress as hfc
from hf_compress.pruning.masks import Blocks, Source
from hf_compress.pruning.selection import grow_steepest, keep_above, keep_largest
from hf_compress.quantization.qat import Quantizers
from hf_compress.training.shards import check_shards, is_sharded, whole

pytestmark = needs_fork
QUICK = {"begin": 0.2, "end": 0.8, "num_updates": 3}


def made(folder, number, settings, max_steps, is_cut):
    """All `settings`, {key: (trainer, options)}, one after the other on one of `number` ranks, kept in `folder`."""

    def job(rank):
        if is_cut:
            share_weights()
        found = {}
        for key, (name, options) in settings.items():
            masks, where = Masks(), folder / key
            result = run(name, where, dropout=0.0, per_device_train_batch_size=8 // number, max_steps=max_steps,
                         extra={"callbacks": [masks]}, **{**OPTIONS.get(name, {}), **options})  # fmt: skip
            assert masks.is_sharded == is_cut
            found[key] = (*result, masks.seen)
        torch.save(found, folder / f"{number}-{rank}.pt")

    return job


def assert_followed(tmp_path, settings, numbers, max_steps, tolerance=1e-4):
    for number in (1, *numbers):
        ranks(made(tmp_path, number, settings, max_steps, is_cut=number > 1), number)
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for number in numbers:
        first, last = (torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in (0, number - 1))
        for key, (tensors, logs, masks) in one.items():
            assert_close(losses_of(first[key][1]), losses_of(logs), tolerance)
            assert masks.keys() == first[key][2].keys()
            assert all(torch.equal(mask, first[key][2][name]) for name, mask in masks.items()), key
            finished = {name: tensor for name, tensor in first[key][0].items() if name.startswith("end")}
            if not key.startswith("Rank"):  # components that weigh alike: one in the place of another
                assert {n: t.shape for n, t in finished.items()} == {n: tensors[n].shape for n in finished}
            assert all(torch.equal(tensor, last[key][0][name]) for name, tensor in finished.items()), key


@pytest.mark.parametrize("numbers", [(2,), pytest.param((4,), marks=pytest.mark.long)])
def test_ranks_that_share_the_weights_prune_and_quantize_as_one(numbers, tmp_path):
    """What is pruned of single weights, and what is rounded: 2 ranks, and 4 that do not all have the same rows."""
    settings = {"movement": ("WeightPruningTrainer", QUICK), "rounded": ("QBertTrainer", {"learned_steps": True})}
    assert_followed(tmp_path, settings, numbers, max_steps=20 if numbers == (4,) else 3)


@pytest.mark.long
def test_ranks_that_share_the_weights_follow_one_by_every_option(tmp_path):
    """Scores, scopes, schedules and penalties, each of which reads weights in its own way, for 20 steps."""
    weights = ({"method": "magnitude", "scope": "row"}, {"method": "wanda"}, {"scope": "bank", "bank_size": 4},
               {"method": "magnitude", "scope": "class-distribution", "grow": 0.2}, {"proximal": 1e-3},
               {"method": "magnitude", "schedule": "two-slopes"}, {"method": "magnitude", "regrow": 0.9},
               {"rewind": 0.1}, {"method": "magnitude", "scope": "class-uniform"})  # fmt: skip
    blocks = ({"method": "norm", "scope": "class-uniform", "group_lasso": 1e-3}, {"method": "taylor"})
    neurons = ({"outgoing": 1e-3, "incoming": 1e-3}, {"incoming": 1e-3, "norm": "max", "multiple_of": 2})
    gates = ({"l0": 1.0},)
    rounded = ({"refresh_steps": 2, "num_groups": 4},)
    found = {"WeightPruningTrainer": weights, "BlockPruningTrainer": blocks, "NeuronPruningTrainer": neurons,
             "HeadGatesTrainer": gates, "HeadPruningTrainer": ({},), "RankGatesTrainer": ({},),
             "QBertTrainer": rounded}  # fmt: skip
    free = ("HeadGatesTrainer", "RankGatesTrainer", "QBertTrainer")
    settings = {
        f"{name}-{number}": (name, options if name in free else {**QUICK, **options})
        for name, several in found.items()
        for number, options in enumerate(several)
    }
    assert_followed(tmp_path, settings, (2,), max_steps=20, tolerance=1e-3)


@pytest.mark.long
def test_ranks_that_share_the_weights_follow_one_by_what_is_put_together(tmp_path, monkeypatch):
    """Pieces beside each other and beside fake-quantized weights, trained ternary values, learned drop rates."""
    ternary = Composition(
        "DistillationTrainer",
        student=lambda student: hfc.prepare_qat(student, 2, grid="ternary", activation_bits=None),
        callbacks=lambda: [hfc.QuantizationAware()],
    )
    monkeypatch.setitem(COMPOSITIONS, "ternary", ternary)
    settings = {
        "ternary": ("ternary", {"teacher_noise": 0.0}),
        "four": ("pruned-in-four-ways", {}),
        "three": ("distilled-pruned-quantized", {}),
        "drops": ("LayerPruningTrainer", {"learned": True}),
    }
    assert_followed(tmp_path, settings, (2,), max_steps=6)


def test_a_finished_model_is_whole_on_each_rank_and_saved(tmp_path):
    """Packed weight by weight: while one is gathered the others are still cut."""

    def job(rank):
        share_weights()
        trainer, still_cut, pack = build("QBertTrainer", tmp_path, dropout=0.0, max_steps=1), [], Quantizers.stored

        def watched(self, module):
            still_cut.append(is_sharded(module.weight))
            return pack(self, module)

        Quantizers.stored = watched
        trainer.train()
        assert len(still_cut) > 10 and all(still_cut)
        assert not any(is_sharded(p) for p in trainer.model.parameters())
        trainer.save_model()
        dist.barrier()
        batch = {key: torch.tensor(value) for key, value in trainer.train_dataset[:4].items()}
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        trainer.model.eval()
        torch.testing.assert_close(loaded(**batch).logits, trainer.model(**batch).logits)
        loss = torch.tensor(trainer.evaluate()["eval_loss"])
        both = [torch.zeros(()) for _ in range(2)]
        dist.all_gather(both, loss)
        assert both[0] == both[1]

    ranks(job, 2)


def cut(tensor, mesh, dim=0):
    return distribute_tensor(tensor.clone(), mesh, [Shard(dim)], src_data_rank=None)


def test_masks_of_cut_scores_are_those_of_whole_ones():
    """Three ranks: rows that do not divide, a matrix that has none on the last, many equals, negative ones."""

    def job(rank):
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (3,))
        generator = torch.Generator().manual_seed(0)
        sizes = ((7, 4), (5, 8), (2, 4))
        equal = [torch.randint(-3, 3, size, generator=generator).float() * 0.0 for size in sizes]
        some = [torch.randint(-3, 3, size, generator=generator).float() for size in sizes]
        distinct = [torch.randn(size, generator=generator) for size in sizes]
        scopes = ({"scope": "class-uniform"}, {"scope": "row"}, {"scope": "bank", "bank_size": 4})
        cases = [(equal, 0.5, {}), (some, 0.0, {}), (some, 0.3, {}), (some, 0.9, {}), (distinct, 0.01, {})]
        for scores, sparsity, options in [*cases, *((some, 0.5, options) for options in scopes)]:
            parts, options = [cut(score, mesh) for score in scores], {"scope": "class-blind", **options}
            expected, found = (keep_largest(several, sparsity, **options) for several in (scores, parts))
            assert all(torch.equal(whole(f), e) for f, e in zip(found, expected, strict=True))
            slopes = [cut(score, mesh) for score in distinct]
            expected, found = (grow_steepest(*pair, 0.1, **options) for pair in ((expected, distinct), (found, slopes)))
            assert all(torch.equal(whole(f), e) for f, e in zip(found, expected, strict=True))
        columns = keep_largest([cut(score, mesh, dim=1) for score in distinct], 0.4)  # as of a Conv1D
        assert all(torch.equal(whole(f), e) for f, e in zip(columns, keep_largest(distinct, 0.4), strict=True))
        magnitudes = [score.abs() for score in distinct]
        found = keep_above([cut(score, mesh) for score in magnitudes], [0.5, 1.0, 99.0])
        expected = keep_above(magnitudes, [0.5, 1.0, 99.0])
        assert all(torch.equal(whole(f), e) for f, e in zip(found, expected, strict=True))
        dist.destroy_process_group()

    ranks(job, 3)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_blocks_that_lie_across_ranks_are_read_and_written_as_whole_ones(kind):
    """8 rows over 3 ranks: 3, 3 and 2, so blocks of 4 lie across; a head's lie on all."""

    def job(rank):
        dist.init_process_group("gloo")
        results = []
        for is_cut in (False, True):
            torch.manual_seed(0)
            output, value = (nn.Linear(8, 8), nn.Linear(6, 8)) if kind is nn.Linear else (Conv1D(8, 8), Conv1D(8, 6))
            nn.init.normal_(value.bias)
            if is_cut:
                for module in (output, value):
                    fully_shard(module)
            source = Source(value, [1, 0, 2, 3, 5, 4, 6, 7], 2)
            square, heads = Blocks("a", output, (4, 4)), Blocks("a", output, (8, 2), (source,))
            told = [square.sum(square.weight), square.largest(square.weight.abs()), heads.sum(heads.weight)]
            square.scale_(torch.tensor([[1.0, 0.5], [2.0, 0.0]]))
            heads.silence_(torch.tensor([[True, False, True, False]]))
            results.append([*told, *(whole(p.detach()) for m in (output, value) for p in m.parameters())])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)  # sums of 16, in another order
        dist.destroy_process_group()

    ranks(job, 3)


def test_weights_cut_otherwise_are_refused():
    """ZeRO-3, FSDP1, and two directions at once: a rank's part would be no whole rows."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    check_shards(model, "Pruning")

    class FullyShardedDataParallel(nn.Module): ...

    with pytest.raises(ValueError, match="FSDP1 makes one long row"):
        check_shards(nn.Sequential(FullyShardedDataParallel(), nn.Linear(2, 2)), "Pruning")

    def job(rank):
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        model[0].weight = nn.Parameter(cut(model[0].weight.detach(), mesh["tp"]))
        with pytest.raises(ValueError, match="in one direction, all of them or none"):
            check_shards(model, "Pruning")
        both = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)], src_data_rank=None)
        with pytest.raises(ValueError, match="in one direction, all of them or none"):
            check_shards(nn.ParameterList([nn.Parameter(both)]), "Pruning")
        hybrid = distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Shard(0)], src_data_rank=None)
        check_shards(nn.ParameterList([nn.Parameter(hybrid)]), "Pruning")
        dist.destroy_process_group()

    ranks(job, 2)
    model[1].weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 keeps them in buffers of its own"):
        check_shards(model, "Pruning")


def test_weights_that_only_the_first_rank_has_are_refused(tmp_path):
    """Accelerate's default: the others would make masks, grids and teachers of nothing."""

    def job(rank):
        share_weights(FSDP_CPU_RAM_EFFICIENT_LOADING="true")
        for name in ("WeightPruningTrainer", "DistillationTrainer"):
            with pytest.raises(ValueError, match="only rank 0 has them"):
                build(name, tmp_path)

    ranks(job, 2)
