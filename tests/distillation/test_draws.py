"""Draws from a teacher have no bias: their mean over all random starts is the teacher, in loss and gradient."""

import json

import pytest
import torch
from helpers import tiny_model
from transformers import default_data_collator

from distillation.data import rows
from distillation.test_cache import config, student_of, teacher_of
from hf_compress.distillation.losses.divergences import drawn_forward_kl, forward_kl
from hf_compress.distillation.losses.sums import drawn_loss
from hf_compress.distillation.methods.word_level import WordLevelConfig, WordLevelTrainer
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.teachers.cache_files import MANIFEST
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.draws import code_bytes, draw, shares, starts, systematic
from hf_compress.distillation.trainer import DistillationTrainer

ROUNDING = dict(rtol=1e-12, atol=1e-12)  # of sums of a few hundred float64 numbers of about 1


def all_starts(p, draws):
    """Every set of draws that a random start can give, and its chance: between two starts at which a draw moves on to
    the next class, all give the same."""
    edges = torch.cat([(draws * p.cumsum(-1)) % 1, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        if high - low > 1e-9:  # else rounding of one edge
            classes, counts, sizes = systematic(p[None], ((low + high) / 2)[None], draws)
            assert len(classes) == int(sizes) and int(counts.sum()) == draws
            yield float(high - low), classes, counts


@pytest.mark.parametrize("draws", [1, 3, 7, 32])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0], ids=["flat", "usual", "sharp"])
def test_the_mean_over_all_starts_is_the_teacher(draws, sharpness):
    generator = torch.Generator().manual_seed(0)
    z_t, z_s = (torch.randn(11, dtype=torch.float64, generator=generator) for _ in range(2))
    p, log_s = (sharpness * z_t).softmax(-1), z_s.log_softmax(-1)
    entropy = torch.special.entr(p).sum()[None, None]
    mean, distance, gradient, total = torch.zeros_like(p), 0.0, torch.zeros_like(p), 0.0
    for chance, classes, counts in all_starts(p, draws):
        assert ((counts - draws * p[classes]).abs() < 1).all()
        share = (counts.double() / draws)[None]
        mean[classes] += chance * share[0]
        value, grad = drawn_forward_kl(log_s[None].clone(), classes[None], share, entropy)
        distance, gradient, total = distance + chance * value, gradient + chance * grad[0], total + chance
    assert total == pytest.approx(1, abs=1e-7)
    torch.testing.assert_close(mean, p, **ROUNDING)
    expected, its_gradient = forward_kl(log_s[None].clone(), p.log()[None])
    torch.testing.assert_close(distance, expected, **ROUNDING)
    torch.testing.assert_close(gradient, its_gradient[0], **ROUNDING)


def test_draws_by_hand():
    """Four draws from (1/2, 1/8, 0, 3/8), at 0.1, 1.1, 2.1 and 3.1 quarters: of the sums 2, 2.5, 2.5 and 4."""
    p = torch.tensor([[0.5, 0.125, 0.0, 0.375]] * 2, dtype=torch.float64)
    classes, counts, sizes = systematic(p, torch.tensor([0.1, 0.6], dtype=torch.float64), 4)
    assert classes.tolist() == [0, 1, 3, 0, 3] and sizes.tolist() == [3, 2]
    assert counts.tolist() == [2, 1, 1, 2, 2]  # at 0.6: 0.6 and 1.6 in the first half, 2.6 and 3.6 in the last class
    drawn = draw(p.log(), torch.tensor([0.1, 0.6], dtype=torch.float64), 4)
    assert drawn.codes.shape == (5, 1) and drawn.sizes.tolist() == [3, 2]
    torch.testing.assert_close(drawn.entropy.double(), torch.special.entr(p).sum(-1, keepdim=True), rtol=1e-3, atol=0)
    found = shares(drawn.codes, drawn.sizes, 4)
    assert found[0].tolist() == [[0, 1, 3], [0, 3, 0]]
    assert found[1].tolist() == [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]


@pytest.mark.parametrize(("classes", "draws", "width"), [(50, 4, 1), (64, 32, 2), (49_152, 64, 3), (151_936, 110, 3),
                                                          (262_144, 64, 3), (262_144, 65, 4)])  # fmt: skip
def test_a_class_and_its_count_come_back_from_few_bytes(classes, draws, width):
    assert code_bytes(classes, draws) == width
    logits = torch.full((2, classes), -torch.inf)
    logits[:, [0, classes - 1]] = 0.0  # the smallest and the largest code
    found = shares(*draw(logits, torch.tensor([0.5, 0.25], dtype=torch.float64), draws)[:2], draws)
    assert found[0].tolist() == [[0, classes - 1]] * 2
    assert (found[1].sum(-1) == 1).all() and ((found[1] - 0.5).abs() < 0.51 / draws).all()


def test_both_losses_are_the_same_function():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(6, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    drawn = draw(3 * torch.randn(6, 9, generator=generator), torch.rand(6, generator=generator).double(), 4)
    classes, share = shares(drawn.codes, drawn.sizes, 4)  # quarters are exact in float32, too
    loss = drawn_loss(student, classes, share.double(), drawn.entropy.double())
    distance, grad = drawn_forward_kl(student.detach().log_softmax(-1), classes, share, drawn.entropy)
    torch.testing.assert_close(loss, distance.sum(), **ROUNDING)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], grad, **ROUNDING)


def test_starts_are_of_the_text_and_the_place_alone():
    keys, places = torch.tensor([7, 7, -3, -3]), torch.tensor([1, 2, 1, 2])
    found = starts(keys, places)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(starts(keys[order], places[order]), found[order]) and len(found.unique()) == 4
    many = starts(torch.arange(4096), torch.ones(4096, dtype=torch.long))
    assert many.min() > 0 and many.max() < 1
    counts = torch.histc(many, 16, 0, 1)
    assert ((counts - 256).abs() < 5 * 256**0.5).all()  # five standard deviations of each of 16 bins


FAMILIES = [("llama", None, "clm"), ("bert", "mlm", "mlm"), ("bart", None, "seq2seq")]


@pytest.mark.parametrize(("family", "task", "kind"), FAMILIES, ids=[k for _, _, k in FAMILIES])
def test_two_trainers_read_the_same_draws(family, task, kind, tmp_path):
    """By code that they do not share; and what they read is what the live teacher's logits give."""
    teacher, data = teacher_of(family, task), rows(12, kind=kind)
    cached = cache_teacher(teacher, data, tmp_path / "cache", draws=6, batch_size=5, shard_size=5)
    batch = default_data_collator(list(data.select(range(5))))
    if kind == "seq2seq":
        batch["decoder_input_ids"] = teacher.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    outputs = cached.look_up(batch)[0]
    real = outputs["drawn_shares"].sum(-1) > 0
    torch.testing.assert_close(outputs["drawn_shares"].sum(-1), real.float())
    assert torch.equal(real, batch["labels"] != -100 if kind == "seq2seq" else batch["attention_mask"].bool())
    with torch.no_grad():
        p = teacher(**batch).logits.softmax(-1)
    mine = torch.zeros_like(p).scatter_add_(-1, outputs["drawn_classes"], outputs["drawn_shares"])
    assert ((mine - p)[real].abs() < 1 / 6 + 1e-5).all()
    torch.testing.assert_close(outputs["entropy"][..., 0][real], torch.special.entr(p).sum(-1)[real], rtol=1e-3, atol=0)
    logs = []
    for kind_of, settings in ((DistillationTrainer, {}), (WordLevelTrainer, {"chunk_size": 7})):
        args = config(tmp_path, kind_of.config_class, hints=None, temperature=1.0, **settings)
        student, sets = student_of(teacher, family), {"train_dataset": data, "eval_dataset": data}
        trainer = kind_of(student, args, teacher_model=cached, **sets)
        trainer.train()
        logs.append([*trainer.state.log_history[:3], trainer.evaluate()])
    for one, two in zip(*logs, strict=True):
        for name in (name for name in one if "loss" in name):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_bytes_a_token(tmp_path):
    """Counted from the tensors of the shards, with the keys, the lengths and the files' headers of two examples."""
    teacher, data = teacher_of("llama"), rows(2, kind="clm")
    teacher.lm_head.weight.data *= 30
    cached = cache_teacher(teacher, data, tmp_path, draws=16)
    (shard,) = cached._shards
    tokens = int(default_data_collator(list(data))["attention_mask"].sum())
    assert len(shard["drawn_sizes"]) == tokens and int(shard["drawn_sizes"].sum()) == len(shard["drawn"])
    assert shard["drawn"].shape[1] == 2 and shard["entropy"].dtype == torch.float16
    content = 2 * len(shard["drawn"]) + (1 + 2) * tokens + 2 * (8 + 8 + 8)
    header = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) - content
    assert cached.bytes_per_token == pytest.approx((content + header) / tokens) and 0 < header < 600
    assert len(shard["drawn"]) < 16 * tokens


def test_a_stopped_run_draws_the_same(tmp_path):
    teacher, data = teacher_of("llama"), rows(8, kind="clm")
    whole = cache_teacher(teacher, data, tmp_path / "whole", draws=8, batch_size=1)
    cache_teacher(teacher, data.select(range(3)), tmp_path / "parts", draws=8, batch_size=1)
    parts = cache_teacher(teacher, data, tmp_path / "parts", draws=8, batch_size=1)
    batch = default_data_collator(list(data))
    for name, value in whole.look_up(batch)[0].items():
        assert torch.equal(parts.look_up(batch)[0][name], value), name


def test_what_draws_cannot_give_is_refused(tmp_path):
    teacher, data = teacher_of("llama"), rows(6, kind="clm")
    cached = cache_teacher(teacher, data, tmp_path / "cache", draws=4)
    student = student_of(teacher)

    def trained(kind, source=cached, mine=student, **options):
        return kind(mine, config(tmp_path, kind.config_class, hints=None, **{"temperature": 1.0, **options}),
                    teacher_model=source, train_dataset=data)  # fmt: skip

    for options in ({"temperature": 2.0}, {"teacher_noise": 0.1}, {"prediction_loss": "logits"}):
        with pytest.raises(ValueError, match="4 draws of each prediction, at temperature 1 and without logits"):
            trained(DistillationTrainer, **options)
    with pytest.raises(ValueError, match="needs all of the teacher's logits, but the cache in .* holds 4 draws"):
        trained(WordLevelTrainer, divergence="reverse")
    with pytest.raises(ValueError, match="which have no mean with other teachers' logits"):
        trained(DistillationTrainer, source=[cached, teacher])
    with pytest.raises(ValueError, match="top_k=3 keeps the largest logits and draws=4 a sample: give one"):
        cache_teacher(teacher, data, tmp_path / "both", draws=4, top_k=3)
    for number in (0, 256):
        with pytest.raises(ValueError, match=f"between 1 and 255, .* got draws={number}"):
            cache_teacher(teacher, data, tmp_path / "number", draws=number)
    for task, kind in ((None, "classification"), ("answers", "answers")):
        with pytest.raises(ValueError, match="which predicts (sequence|spans)"):
            cache_teacher(tiny_model("bert", task), rows(4, kind=kind), tmp_path / kind, draws=4)
    with pytest.raises(ValueError, match="belongs to another draws: it has 4, now it is 5"):
        cache_teacher(teacher, data, tmp_path / "cache", draws=5)
    teacher.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite at"):
        cache_teacher(teacher, data, tmp_path / "nan", draws=4)


def test_a_cache_of_before_is_read(tmp_path):
    """It names no draws."""
    teacher, data = teacher_of("llama"), rows(4, kind="clm")
    cache_teacher(teacher, data, tmp_path, top_k=4)
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    del manifest["draws"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert len(CachedTeacher(tmp_path)) == 4
    assert len(cache_teacher(teacher, rows(6, kind="clm"), tmp_path, top_k=4)) == 6
    args = config(tmp_path / "student", WordLevelConfig, hints=None)
    WordLevelTrainer(student_of(teacher), args, teacher_model=tmp_path, train_dataset=data).train()


def test_a_manifest_that_says_other_draws_is_refused(tmp_path):
    teacher, data = teacher_of("llama"), rows(4, kind="clm")
    cache_teacher(teacher, data, tmp_path, draws=4)
    whole = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    for changed in (*({"draws": odd} for odd in (None, 0, -1, 256, "4", [4], True)), {"classes": 3},
                    {"stored": {**whole["stored"], "drawn": "input"}}, {"stored": {"entropy": "input"}},
                    {"stored": {"logits": "draw"}}):  # fmt: skip
        (tmp_path / MANIFEST).write_text(json.dumps({**whole, **changed}), encoding="utf-8")
        with pytest.raises(ValueError, match="damaged"):
            CachedTeacher(tmp_path).look_up(default_data_collator(list(data)))
