"""A cached teacher is the teacher: the same losses, whatever the order; and what is not its own is refused."""

import json
import threading
import time

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from helpers import tiny_model
from machine import needs_fork, ranks
from torch import nn
from transformers import AutoModelForMultipleChoice, default_data_collator

from distillation.data import rows
from distillation.test_trainer import TASKS as ALL_TASKS
from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.losses.divergences import top_k_forward_kl
from hf_compress.distillation.losses.sums import soft_loss
from hf_compress.distillation.methods.distilbert import DistilBertTrainer
from hf_compress.distillation.methods.pkd import PKDTrainer
from hf_compress.distillation.methods.tinybert import TinyBertTrainer
from hf_compress.distillation.methods.word_level import WordLevelTrainer
from hf_compress.distillation.students import make_student
from hf_compress.distillation.teachers import cache
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.teachers.cache_files import MANIFEST
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher, complete
from hf_compress.distillation.teachers.example_keys import example_keys
from hf_compress.distillation.trainer import DistillationTrainer


def config(folder, kind=DistillationConfig, **options):
    defaults = dict(use_cpu=True, max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to="none",
                    save_strategy="no", disable_tqdm=True, learning_rate=1e-3, hints="1:2")  # fmt: skip
    return kind(str(folder), **{**defaults, **options})


def teacher_of(family="bert", task=None, **changes):
    return tiny_model(family, task, seed=3, **changes)


def student_of(teacher, family="bert"):
    torch.manual_seed(5)
    return make_student(teacher, num_hidden_layers=1 if family == "bart" else 2, hidden_size=16)


TASKS = [task for task in ALL_TASKS if task[0] not in ("modernbert", "deberta-v2", "gpt2")]  # others of their kind stay


@pytest.mark.parametrize(("family", "task", "kind", "changes"), TASKS, ids=[f"{f}-{k}" for f, _, k, _ in TASKS])
def test_the_losses_are_those_of_the_live_teacher(family, task, kind, changes, tmp_path):
    """Training, evaluation and hidden states of both sides; the data shuffled, in other batches than it was cached."""
    data = rows(20, kind=kind, labels=changes.get("num_labels", 2))
    hints = "1:2,3:5" if family == "bart" else "1:2"
    states = (2, 5) if family == "bart" else (2,)
    cache_teacher(teacher_of(family, task, **changes), data, tmp_path / "cache", hidden_states=states, batch_size=8)
    logs = []
    for teacher in (teacher_of(family, task, **changes), tmp_path / "cache"):
        student = student_of(teacher_of(family, task, **changes), family)
        args = config(tmp_path, hints=hints, teacher_noise=0.1)
        trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data, eval_dataset=data)
        trainer.train()
        logs.append([*trainer.state.log_history[:3], trainer.evaluate()])
    for live, cached in zip(*logs, strict=True):
        losses = [name for name in live if "loss" in name]
        assert len(losses) >= 4
        for name in losses:
            assert cached[name] == pytest.approx(live[name], rel=1e-4), name


@pytest.mark.parametrize("kind", [PKDTrainer, DistilBertTrainer], ids=["pkd", "distilbert"])
def test_other_methods_read_the_cache_too(kind, tmp_path):
    """What a method needs of inner layers is named by its refusal, and then is what the live teacher gives."""
    teacher, data, logs = teacher_of(), rows(12), []
    plain = cache_teacher(teacher, data, tmp_path / "plain")
    student = make_student(teacher, num_hidden_layers=2)
    args = config(tmp_path, kind.config_class, hints=None)
    with pytest.raises(ValueError, match=r"needs the teacher's hidden states \[\d\]") as refusal:
        kind(student, args, teacher_model=plain, train_dataset=data)
    states = [int(refusal.value.args[0].split("hidden states [")[1][0])]
    for source in (teacher, cache_teacher(teacher, data, tmp_path / "cache", hidden_states=states)):
        logs.append(kind(student, args, teacher_model=source, train_dataset=data, eval_dataset=data).evaluate())
    for name in [name for name in logs[0] if "loss" in name]:
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name


def test_half_precision_rounds_to_half_precision(tmp_path):
    teacher, data = teacher_of(), rows(8)
    teacher.classifier.weight.data *= 30
    batch = default_data_collator(list(data))
    exact = cache_teacher(teacher, data, tmp_path / "exact").look_up(batch)[0]["logits"]
    half = cache_teacher(teacher, data, tmp_path / "half", dtype=torch.float16).look_up(batch)[0]["logits"]
    with torch.no_grad():
        torch.testing.assert_close(exact, teacher(batch["input_ids"], batch["attention_mask"]).logits)
    torch.testing.assert_close(half, exact, rtol=2**-11, atol=1e-7)  # 11 bits of precision
    student = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert soft_loss(student, half, 2.0) == pytest.approx(soft_loss(student, exact, 2.0).item(), rel=2e-3)
    assert half.dtype == exact.dtype == torch.float32
    teacher.classifier.weight.data *= 1e6
    with pytest.raises(ValueError, match=r"dtype=torch.float16 cannot hold the teacher's logits: it goes up to"):
        cache_teacher(teacher, data, tmp_path / "large", dtype=torch.float16)


def bucketed(student, teacher, k):
    """KL over the teacher's k largest classes and one for all the others, as a loop in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for z_s, z_t in zip(student, teacher, strict=True):
        p_s, p_t = z_s.softmax(-1), z_t.softmax(-1)
        top = z_t.topk(k).indices.tolist()
        for i in top:
            total = total + p_t[i] * (p_t[i] / p_s[i]).log()
        others = [i for i in range(len(z_t)) if i not in top]
        if others:
            total = total + p_t[others].sum() * (p_t[others].sum() / p_s[others].sum()).log()
    return total


def test_half_precision_can_be_cached_under_autocast(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        cached = cache_teacher(teacher_of(), rows(6), tmp_path, dtype=torch.float16, batch_size=2)
    assert len(cached) == 6


@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_largest_logits_and_the_mass_of_the_rest(k):
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(6, 12, dtype=torch.float64, generator=generator)
    student = torch.randn(6, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = bucketed(student, teacher, k)
    gradient = torch.autograd.grad(expected, student)[0]
    top, indices = teacher.topk(k)
    rest = teacher.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    completed = complete(top, indices.int(), rest, student.detach(), classes=12)
    loss = soft_loss(student.float(), completed, 1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient, rtol=1e-4, atol=1e-6)
    same = complete(top, indices.int(), rest, teacher, classes=12)
    torch.testing.assert_close(same.double(), teacher, rtol=1e-5, atol=1e-5)  # so the loss is 0 at any temperature
    padded = torch.cat([student.detach(), torch.ones(6, 4)], dim=-1)
    torch.testing.assert_close(complete(top, indices, rest, padded, classes=12), completed)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_largest_logits_alone(k, temperature):
    """The k probabilities sum to one, the others have none: softmax over the k logits, written out."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(6, 12, dtype=torch.float64, generator=generator)
    student = torch.randn(6, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    top, indices = teacher.topk(k)
    p_t = (top / temperature).softmax(-1)
    log_s = (student / temperature).log_softmax(-1).gather(1, indices)
    expected = temperature**2 * (p_t * (p_t.log() - log_s)).sum()
    gradient = torch.autograd.grad(expected, student)[0]
    completed = complete(top, indices.int(), torch.full((6, 1), -torch.inf), student.detach(), classes=12)
    loss = soft_loss(student.float(), completed, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient, rtol=1e-4, atol=1e-6)
    if temperature == 1:
        log_all = student.detach().log_softmax(-1)
        rows, grad = top_k_forward_kl(log_all.clone(), top, indices, torch.full((6, 1), -torch.inf))
        torch.testing.assert_close(rows.sum(), expected.detach())
        torch.testing.assert_close(grad, gradient)


def test_what_becomes_of_the_rest_is_a_choice_of_the_teacher(tmp_path):
    """Two ways to compute the loss that share no code agree on either choice."""
    data, teacher = rows(8, kind="clm"), teacher_of("llama")
    cache_teacher(teacher, data, tmp_path / "cache", top_k=4)
    losses = {}
    for rest in ("kept", "renormalised"):
        for kind in (DistillationTrainer, WordLevelTrainer):
            args = config(tmp_path, kind.config_class, hints=None, temperature=1.0, alpha=1.0)
            cached = CachedTeacher(tmp_path / "cache", rest=rest)
            trainer = kind(student_of(teacher), args, teacher_model=cached, train_dataset=data, eval_dataset=data)
            losses[rest, kind] = trainer.evaluate()["eval_soft_loss"]
    for rest in ("kept", "renormalised"):
        assert losses[rest, WordLevelTrainer] == pytest.approx(losses[rest, DistillationTrainer], rel=1e-5, abs=1e-6)
    assert losses["renormalised", WordLevelTrainer] > 2 * losses["kept", WordLevelTrainer]  # a flat teacher of 64 words
    with pytest.raises(ValueError, match="rest must be one of kept, renormalised, got 'dropped'"):
        CachedTeacher(tmp_path / "cache", rest="dropped")


def test_a_vocabulary_by_its_largest_logits(tmp_path):
    data, losses = rows(8, kind="clm"), []
    teacher = teacher_of("llama")
    teacher.lm_head.weight.data *= 30  # so that a few tokens hold most of the mass
    for name, options in {"all": {}, "64": dict(top_k=64), "16": dict(top_k=16), "2": dict(top_k=2)}.items():
        cached = cache_teacher(teacher, data, tmp_path / name, **options)
        args = config(tmp_path, hints=None, temperature=1.0)
        student = student_of(teacher)
        trainer = DistillationTrainer(student, args, teacher_model=cached, train_dataset=data, eval_dataset=data)
        losses.append(trainer.evaluate()["eval_soft_loss"])
    whole, same, sixteen, two = losses
    assert same == pytest.approx(whole, rel=1e-5)
    assert two < sixteen < whole and sixteen == pytest.approx(whole, rel=0.05)  # merging classes loses information


def test_keys_are_of_the_content_alone():
    data = rows(12)
    batch = default_data_collator(list(data))
    columns = ["input_ids"]
    keys = example_keys(batch, columns)
    assert len(keys.unique()) == 12
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(example_keys({k: v[order] for k, v in batch.items()}, columns), keys[order])
    for sides in ((0, 7), (7, 0)):  # padding at either end, with other numbers in it
        wider = {k: nn.functional.pad(batch[k], sides) for k in ("input_ids", "attention_mask")}
        wider["input_ids"] = wider["input_ids"].masked_fill(wider["attention_mask"] == 0, 9)
        assert torch.equal(example_keys(wider, columns), keys)
    for row in range(12):
        assert row == 0 or batch["attention_mask"][row].sum() >= 4
    changed = batch["input_ids"].clone()
    changed[:, 2] += 1
    assert not torch.isin(example_keys({**batch, "input_ids": changed}, columns), keys).any()
    swapped = batch["input_ids"][:, [1, 0, *range(2, 12)]]
    differs = batch["input_ids"][:, 0] != batch["input_ids"][:, 1]
    assert torch.equal(example_keys({**batch, "input_ids": swapped}, columns) != keys, differs)
    pairs = {**batch, "token_type_ids": torch.zeros_like(changed)}
    other = {**pairs, "token_type_ids": torch.ones_like(changed)}
    both = [*columns, "token_type_ids"]
    assert not torch.isin(example_keys(pairs, both), example_keys(other, both)).any()


def counting(teacher):
    """How many examples the teacher has read since."""
    seen = []
    teacher.register_forward_pre_hook(lambda module, args, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    return seen


def test_a_stopped_run_goes_on_and_new_examples_are_added(tmp_path, monkeypatch):
    teacher, data = teacher_of(), rows(20)
    write, written = cache.write_shard, []

    def fail(folder, tensors):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(len(tensors["keys"]))
        write(folder, tensors)

    monkeypatch.setattr(cache, "write_shard", fail)
    options = dict(batch_size=4, shard_size=4)
    with pytest.raises(OSError, match="No space left"):
        cache_teacher(teacher, data, tmp_path, **options)
    assert written == [4, 4, 4]
    monkeypatch.setattr(cache, "write_shard", write)
    with pytest.raises(ValueError, match="was not finished. Call hfc.cache_teacher again"):
        CachedTeacher(tmp_path)
    seen = counting(teacher)
    assert len(cache_teacher(teacher, data, tmp_path, **options)) == 20
    assert sum(seen) - 4 == 20 - 12  # 4 to learn what there is to store
    more = rows(30)  # the same first 20
    assert len(cache_teacher(teacher, more, tmp_path, **options)) == 30
    assert sum(seen) == 8 + 10 + 2 * 4
    assert not list(tmp_path.glob("*.json.*")) and len(list(tmp_path.glob("*.json"))) == 1
    batch = default_data_collator(list(more))
    with torch.no_grad():
        expected = teacher_of()(**batch).logits
    torch.testing.assert_close(CachedTeacher(tmp_path).look_up(batch)[0]["logits"], expected)


@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_cache_is_refused_and_repaired(damage, tmp_path):
    teacher, data = teacher_of(), rows(20)
    cache_teacher(teacher, data, tmp_path, batch_size=4, shard_size=8)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-3] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    found = {
        "cut": f"has {len(whole) - 3} bytes where the manifest says {len(whole)}",
        "altered": "was altered: its SHA-256 is",
        "missing": "is missing",
    }[damage]
    with pytest.raises(ValueError, match=f"1 of 3 shards .* are damaged: {shard.name} {found}"):
        DistillationTrainer(student_of(teacher), config(tmp_path), teacher_model=tmp_path, train_dataset=data)
    seen = counting(teacher)
    assert len(cache_teacher(teacher, data, tmp_path, batch_size=4, shard_size=8)) == 20
    assert sum(seen) - 4 in (4, 8)  # the examples of one shard


def test_what_is_not_its_own_is_refused(tmp_path):
    teacher, data = teacher_of(), rows(12)
    cache_teacher(teacher, data, tmp_path, hidden_states=(2,), processing_class=Vocabulary("abc"))

    def trainer(*, data=data, student=None, kind=DistillationTrainer, processing_class=None, **options):
        args = config(tmp_path, kind.config_class, **options)
        student = student or student_of(teacher)
        return kind(student, args, teacher_model=str(tmp_path), train_dataset=data, processing_class=processing_class)

    trainer(processing_class=Vocabulary("abc"))
    with pytest.raises(ValueError, match=r"3 of 15 examples of the training set are not among the 12 in the cache"):
        trainer(data=rows(15))
    with pytest.raises(ValueError, match="belongs to another tokenizer: it has '"):
        trainer(processing_class=Vocabulary("abd"))
    with pytest.raises(ValueError, match=r"needs the teacher's hidden states \[3, 4\], but the cache .* holds \[2\]"):
        trainer(hints="1:3,2:4")
    with pytest.raises(ValueError, match="TinyBertTrainer compares attention, for which the teacher has to run"):
        trainer(kind=TinyBertTrainer, hints=None)
    with pytest.raises(ValueError, match="the student has num_labels=5, the teacher num_labels=2"):
        trainer(student=tiny_model("bert", num_labels=5))
    with pytest.raises(ValueError, match="points to hidden state 9 of the teacher, which has 0 .* to 4"):
        trainer(hints="1:9")
    unseen = DistillationTrainer(student_of(teacher), config(tmp_path), teacher_model=tmp_path, train_dataset=data)
    with pytest.raises(ValueError, match=r"of 8 examples of a batch are not among the 12 in the cache"):
        unseen.evaluate(rows(8, seed=1))
    with pytest.raises(ValueError, match="There is no teacher cache at"):
        CachedTeacher(tmp_path / "none")
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "version": 9}), encoding="utf-8")
    with pytest.raises(ValueError, match="has version 9, but this hf_compress reads version 1"):
        CachedTeacher(tmp_path)


def test_writing_is_refused_where_it_could_not_be_read(tmp_path):
    teacher, data = teacher_of(), rows(12)
    cache_teacher(teacher, data, tmp_path / "cache")
    for options, message in (
        (dict(top_k=3), "top_k must lie between 1 and the number of classes: got top_k=3 for 2 classes"),
        (dict(hidden_states=(5,)), r"hidden_states are 0 \(the embedding\) to 4 in this teacher, got 5"),
        (dict(data_collator=shuffled), "gives the same examples other inputs each time"),
        (dict(data_collator=lambda rows: {"text": ["?"] * len(rows)}), r"Tokenize the dataset first"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_teacher(teacher, data, tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="The dataset is empty"):
        cache_teacher(teacher, data.select([]), tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to another dtype: it has 'float32', now it is 'float16'"):
        cache_teacher(teacher, data, tmp_path / "cache", dtype=torch.float16)
    teacher.classifier.bias.data += 1e-6
    with pytest.raises(ValueError, match="belongs to another teacher: it has '"):
        cache_teacher(teacher, data, tmp_path / "cache")


def shuffled(rows):
    batch = default_data_collator(rows)
    return {**batch, "input_ids": torch.randint_like(batch["input_ids"], 5, 60)}


class Vocabulary:
    """As much of a tokenizer as its fingerprint needs."""

    def __init__(self, words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)


def test_the_teacher_is_not_in_memory_and_stays_as_it_was(tmp_path):
    teacher, data = teacher_of().train(), rows(8)
    cached = cache_teacher(teacher, data, tmp_path)
    assert all(module.training for module in teacher.modules())
    again = cache_teacher(teacher, data, tmp_path)  # dropout was off: nothing differs
    batch = default_data_collator(list(data))
    assert torch.equal(cached.look_up(batch)[0]["logits"], again.look_up(batch)[0]["logits"])
    assert all(p.is_meta for p in cached.parameters())
    with pytest.raises(TypeError, match="has no weights to run"):
        cached(**batch)


def test_a_teacher_and_a_student_of_ones_own(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.EmbeddingBag(64, 8), nn.Linear(8, 2)

        def forward(self, input_ids, labels=None):
            logits = self.out(self.words(input_ids))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}

    data = [{k: torch.tensor(v) for k, v in row.items() if k != "attention_mask"} for row in rows(8)]
    cached = cache_teacher(Bag(), data, tmp_path, batch_size=4)
    trainer = DistillationTrainer(Bag(), config(tmp_path, hints=None), teacher_model=cached, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["soft_loss"] > 0


def test_jobs_that_were_started_apart_write_one_after_the_other(tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    held, written_before = threading.Event(), []

    def another_job():
        with FileLock(tmp_path / "cache" / ".lock"):
            held.set()
            time.sleep(0.5)
            written_before.extend(tmp_path.glob("cache/*.*"))

    other = threading.Thread(target=another_job)
    other.start()
    held.wait()
    cached = cache_teacher(teacher_of(), rows(6), tmp_path / "cache")
    other.join()
    assert len(cached) == 6 and not [file for file in written_before if file.name != ".lock"]
    assert "waiting for it to finish" in caplog.text


@needs_fork
def test_two_processes_write_one_cache(tmp_path):
    """Each rank has its part; what comes out is what one process wrote."""
    ranks(lambda rank: cache_teacher(teacher_of(), rows(20), tmp_path / "two", batch_size=4, shard_size=4), 2)
    one, two = cache_teacher(teacher_of(), rows(20), tmp_path / "one"), CachedTeacher(tmp_path / "two")
    assert len(two) == len(one) == 20 and len(two.manifest["shards"]) >= 4
    batch = default_data_collator(list(rows(20)))
    torch.testing.assert_close(two.look_up(batch)[0]["logits"], one.look_up(batch)[0]["logits"])


def choices(texts: int = 8) -> list[dict]:
    """Questions with two choices of different lengths, those of some the same tokens in another order."""
    generator = torch.Generator().manual_seed(2)
    found = [[[5 + i, 6, 7], [8, 9]] for i in range(texts // 2)] + [[[8, 9], [5 + i, 6, 7]] for i in range(texts // 2)]
    lengths = torch.randint(0, 3, (texts, 2), generator=generator).tolist()
    ids = [[c + [10] * n for c, n in zip(pair, more, strict=True)] for pair, more in zip(found, lengths, strict=True)]
    return [{"input_ids": pair, "attention_mask": [[1] * len(c) for c in pair], "labels": i % 2}
            for i, pair in enumerate(ids)]  # fmt: skip


def padded_choices(examples: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(c) for example in examples for c in example["input_ids"])
    return {"labels": torch.tensor([e["labels"] for e in examples])} | {
        name: torch.tensor([[c + [0] * (width - len(c)) for c in e[name]] for e in examples])
        for name in ("input_ids", "attention_mask")
    }


def test_multiple_choice_is_cached_as_one_example(tmp_path):
    """In whatever batch and padding, and a choice's token is not another's."""
    data = choices()
    torch.manual_seed(3)
    teacher = AutoModelForMultipleChoice.from_config(tiny_model().config).eval()
    kept = cache_teacher(teacher, Dataset.from_list(data), tmp_path / "cache", data_collator=padded_choices,
                         batch_size=3)  # fmt: skip
    with torch.no_grad():
        for batch in (padded_choices(data), *(padded_choices([one]) for one in data)):
            found = kept.look_up(batch)[0]["logits"]
            torch.testing.assert_close(found, teacher(**batch).logits, rtol=1e-5, atol=1e-6)
    whole = example_keys(padded_choices(data), ["input_ids"])
    assert whole.shape == (8,) and len(set(whole.tolist())) == 8
    assert whole.tolist() == [example_keys(padded_choices([one]), ["input_ids"]).item() for one in data]
    moved = {"input_ids": [[[5, 6], [7]], [[5], [6, 7]]], "attention_mask": [[[1, 1], [1]], [[1], [1, 1]]]}
    keys = example_keys(padded_choices([{**{n: v[i] for n, v in moved.items()}, "labels": 0} for i in (0, 1)]),
                        ["input_ids"])  # fmt: skip
    assert keys[0] != keys[1]  # the same words, otherwise divided
    with pytest.raises(ValueError, match="Hidden states of multiple choice are not cached"):
        cache_teacher(teacher, Dataset.from_list(data), tmp_path / "states", data_collator=padded_choices,
                      hidden_states=[1])  # fmt: skip
