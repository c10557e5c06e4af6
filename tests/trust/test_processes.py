"""Two processes follow the trajectory of one with the same global batch, for every trainer, and agree to the bit."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks.cpu_fsdp import share_weights
from distillation.data import rows
from helpers import tiny_model
from machine import long_but, needs_fork, ranks
from transformers import TrainerCallback
from trust.trainers import CAUSAL, TRAINERS, build, data_of, run

import hf_compress as hfc
from hf_compress.quantization import gptq_model
from hf_compress.quantization.gptq import quantize_weight
from hf_compress.training.shards import whole

pytestmark = needs_fork
# one process's batch is 8, two have 4 each: their losses are sums over the same 8 examples, in another order
TOLERANCE = 1e-4
ALIKE = [
    name for name in TRAINERS if name != "RelationalTrainer"
]  # relations are those of examples in a batch together
OPTIONS = {
    "DistillationTrainer": {"teacher_noise": 0.0},  # the noise of an example is drawn by its place in the batch
    "EmbeddingDistillationTrainer": {"similarity_weight": 0.0},  # similarities are those of examples in a batch, too
}
DRAWING = (
    "HeadGatesTrainer",
    "LayerPruningTrainer",
    "RankGatesTrainer",
    "TheseusTrainer",
)  # each rank has generators of its own
# MiniLM's student begins as a copy whose relations are the teacher's but for rounding, which Adam makes steps of;
# ScaleTrainer refuses parts of layers
SHARED = [n for n in ALIKE if n not in ("MiniLMTrainer", "ScaleTrainer")] + ["relations-from-scratch"]


class Masks(TrainerCallback):
    """Every mask after every step, by step and name."""

    def __init__(self):
        self.seen: dict[str, torch.Tensor] = {}
        self.is_sharded = False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.is_sharded = all(hasattr(p, "device_mesh") for p in model.parameters())
        for name, buffer in getattr(model, "hfc_training_state", torch.nn.Module()).named_buffers():
            if buffer.dtype == torch.bool:
                self.seen[f"{state.global_step}.{name}"] = whole(buffer).clone()


def job_of(name, folder, number, resume=None, layer=None, **options):
    """A run on one of `number` ranks, kept in `folder` beside the masks of all steps; under FSDP2 by `layer`."""

    def train(rank):
        if layer is not None:
            share_weights(layer)
        masks = Masks()
        result = run(name, folder, resume, dropout=0.0, per_device_train_batch_size=8 // number,
                     extra={"callbacks": [masks]},
                     **{"save_strategy": "steps", "save_steps": 3, **OPTIONS.get(name, {}), **options})  # fmt: skip
        assert masks.is_sharded == (layer is not None)
        torch.save((*result, masks.seen), folder / f"rank-{rank}.pt")

    folder.mkdir(exist_ok=True)
    return train


def losses_of(logs):
    entries = [{k: v for k, v in entry.items() if k.endswith("loss")} for entry in logs]
    return [losses for losses in entries if losses]


def assert_close(found, expected, tolerance=TOLERANCE):
    assert len(found) == len(expected) > 1
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-6)


def of_rank(folder, rank):
    return torch.load(folder / f"rank-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", long_but(ALIKE, "SelfDistillationTrainer"))
def test_two_processes_follow_one_and_each_takes_up_the_others_checkpoint(name, tmp_path):
    folders = {number: tmp_path / str(number) for number in (1, 2)}
    for number, folder in folders.items():
        ranks(job_of(name, folder, number), number)
    one, first, second = of_rank(folders[1], 0), of_rank(folders[2], 0), of_rank(folders[2], 1)
    for key, tensor in first[0].items():
        if key.startswith((".model", ".state", "end")):
            assert torch.equal(tensor, second[0][key]), key
    assert first[2].keys() == second[2].keys()
    assert all(torch.equal(mask, second[2][key]) for key, mask in first[2].items())
    assert len(losses_of(one[1])) == 6
    assert_close(losses_of(first[1]), losses_of(one[1]))
    names = [sorted(p.name for p in (folder / "checkpoint-3").iterdir()) for folder in folders.values()]
    assert [n for n in names[1] if "rng_state" not in n] == [n for n in names[0] if "rng_state" not in n]
    for number, other in ((1, 2), (2, 1)):
        folder = tmp_path / f"{other}-by-{number}"
        ranks(job_of(name, folder, number, resume=str(folders[other] / "checkpoint-3")), number)
        resumed = of_rank(folder, 0)
        assert resumed[1][-1]["step"] == 6
        if name not in DRAWING:
            assert_close(losses_of(resumed[1]), losses_of(one[1]))


@pytest.mark.long
@pytest.mark.parametrize("name", ALIKE)
def test_two_and_four_processes_follow_one_for_fifty_steps(name, tmp_path):
    for number in (1, 2, 4):
        ranks(job_of(name, tmp_path / str(number), number, max_steps=50, save_strategy="no"), number)
    one, *more = (of_rank(tmp_path / str(number), 0) for number in (1, 2, 4))
    assert len(losses_of(one[1])) == 50
    for several in more:
        # a weight between two integers goes to either one, by the last bit of a sum
        assert_close(losses_of(several[1]), losses_of(one[1]), 1e-3 if name == "QBertTrainer" else TOLERANCE)
        assert all(torch.equal(mask, several[2][key]) for key, mask in one[2].items())


@pytest.mark.parametrize("name", long_but(SHARED, "WordLevelTrainer"))
def test_two_processes_that_share_the_weights_follow_one(name, tmp_path):
    """FSDP2: each holds half of the student, of what trains with it and of the teacher."""
    one, two = follow_one(name, 2, tmp_path)
    for key, tensor in one[0].items():
        if key.startswith(".model"):
            torch.testing.assert_close(two[0][key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_scales_are_not_learned_from_parts_of_layers(tmp_path):
    def refused(rank):
        with pytest.raises(ValueError, match="ScaleTrainer needs whole layers in each process: use DDP"):
            job_of("ScaleTrainer", tmp_path / "out", 2, layer="LlamaDecoderLayer")(rank)

    ranks(refused, 2)


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_four_processes_that_share_the_weights_follow_one_for_twenty_steps(name, tmp_path):
    follow_one(name, 4, tmp_path, max_steps=20, save_strategy="no")


def follow_one(name, number, tmp_path, **options):
    """Under FSDP2: the same losses and masks; gives what each run ended with."""
    layer = "LlamaDecoderLayer" if name in CAUSAL else "BertLayer"
    # the head of a language model is read by the loss, in training and in evaluation
    options |= dict(hints="1:2", eval_strategy="steps", eval_steps=3) if name in CAUSAL else {}
    ranks(job_of(name, tmp_path / "one", 1, **options), 1)
    ranks(job_of(name, tmp_path / "several", number, layer=layer, **options), number)
    one, several = of_rank(tmp_path / "one", 0), of_rank(tmp_path / "several", 0)
    assert_close(losses_of(several[1]), losses_of(one[1]))
    assert one[2].keys() == several[2].keys()
    assert all(torch.equal(mask, several[2][key]) for key, mask in one[2].items())
    return one, several


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SelfDistillationTrainer", {}),
        ("WeightPruningTrainer", {}),
        ("QBertTrainer", {"learned_steps": True}),
        ("HeadGatesTrainer", {}),
    ],
)
def test_sharded_weights_and_what_trains_with_them_are_resumed(name, options, tmp_path):
    """The exits of self-distillation are weights of their own; masks, scores and learned scales lie beside others."""
    folders = [tmp_path / n for n in ("whole", "resumed")]
    ranks(job_of(name, folders[0], 2, layer="BertLayer", **options), 2)
    checkpoint = folders[0] / "checkpoint-3"
    ranks(job_of(name, folders[1], 2, resume=str(checkpoint), layer="BertLayer", **options), 2)
    straight, resumed = of_rank(folders[0], 0), of_rank(folders[1], 1)
    assert resumed[1] == straight[1]
    kept = {key: tensor for key, tensor in straight[0].items() if key.startswith((".model", ".state", ".optimizer"))}
    assert any(key.startswith(".state") for key in kept)
    assert all(torch.equal(tensor, resumed[0][key]) for key, tensor in kept.items())


def test_two_processes_are_given_one_stream_and_go_on_in_its_middle(tmp_path):
    """One rank reads it and hands out batches; 20 rows end in the middle of a batch of 8, and begin again."""

    def job(folder, number, resume=None):
        def train(rank):
            stream = data_of("DistillationTrainer", 20).to_iterable_dataset(num_shards=2)
            result = run("DistillationTrainer", folder, resume, dropout=0.0, per_device_train_batch_size=8 // number,
                         save_strategy="steps", save_steps=3, max_steps=6, teacher_noise=0.0,
                         extra={"train_dataset": stream})  # fmt: skip
            torch.save((*result, {}), folder / f"rank-{rank}.pt")

        folder.mkdir()
        return train

    ranks(job(tmp_path / "1", 1), 1)
    ranks(job(tmp_path / "2", 2), 2)
    ranks(job(tmp_path / "resumed", 2, str(tmp_path / "2" / "checkpoint-3")), 2)
    one, two, resumed = (of_rank(tmp_path / name, 0) for name in ("1", "2", "resumed"))
    assert_close(losses_of(two[1])[:2], losses_of(one[1])[:2])  # the third batch is filled up from the first
    assert resumed[1] == two[1]
    assert all(torch.equal(tensor, resumed[0][key]) for key, tensor in two[0].items())


@pytest.mark.parametrize("name", ["HeadPruningTrainer", "HeadGatesTrainer"])
def test_gradients_that_deepspeed_keeps_for_itself_are_not_pruned_by(name, tmp_path):
    """Under ZeRO `grad` is empty: scores would stay at zero, and the penalty on gates would change nothing."""
    trainer = build(name, tmp_path)
    trainer.args.deepspeed_plugin = "there"
    with pytest.raises(ValueError, match="DeepSpeed works on copies of its own"):
        trainer.train()


def calibrated(folder, number):
    """GPTQ on one of `number` ranks, each with its part of 24 rows: every Hessian, and the model."""

    def job(rank):
        if number > 1:
            dist.init_process_group("gloo")
        hessians = {}

        def keep(W, hessian, *args, name, **kwargs):
            hessians.update({one: hessian.clone() for one in name.split(", ")})
            return quantize_weight(W, hessian, *args, name=name, **kwargs)

        with mock.patch.object(gptq_model, "quantize_weight", keep):
            model = hfc.quantize(
                tiny_model("llama"), 4, method="gptq", group_size=16, calibration=rows(24, kind="clm").select(
                    range(rank * 24 // number, (rank + 1) * 24 // number)
                ), batch_size=4, exact_products=True, split_over_ranks=number > 1,
            )  # fmt: skip
        torch.save((hessians, model.state_dict()), folder / f"{number}-{rank}.pt")

    return job


def test_calibration_split_over_ranks_gives_the_same_hessians(tmp_path):
    """In exact arithmetic; in float32 the first layer's agree to rounding, later ones see what was rounded before."""
    for number in (1, 2):
        ranks(calibrated(tmp_path, number), number)
    (one, _), (first, model), (second, other) = (torch.load(tmp_path / f"{n}.pt") for n in ("1-0", "2-0", "2-1"))
    assert one.keys() == first.keys() and len(one) == 28
    assert all(torch.equal(hessian, second[name]) for name, hessian in first.items())
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.items())
    for name, hessian in one.items():
        tolerance = 1e-5 if "layers.0." in name and "down" not in name else 5e-2
        assert (first[name] - hessian).norm() < tolerance * hessian.norm(), name


def test_ranks_that_do_not_exist_are_not_split_over():
    with pytest.raises(ValueError, match="split_over_ranks needs several processes"):
        hfc.quantize(tiny_model("bert"), 4, method="gptq", calibration=rows(4), split_over_ranks=True)
