"""The teacher's own outputs become a dataset, whatever the padding, and a stopped run goes on."""

import math

import pytest
import torch
from datasets import Dataset
from helpers import tiny_model
from tokenizers import Tokenizer, models
from transformers import DataCollatorForSeq2Seq, GenerationConfig, PreTrainedTokenizerFast

import hf_compress as hfc
from distillation.data import rows
from hf_compress.distillation.texts.sequence_level import generated
from hf_compress.distillation.texts.similarity import closest, sentence_bleu

ENDS = list(range(2, 16))  # many, so that some targets end before the limit
OPTIONS = dict(num_beams=3, max_new_tokens=6)


def teacher_of(family):
    teacher = tiny_model(family, seed=3)
    with torch.no_grad():  # random models repeat one token for ever: let the weights speak, and the end come
        for parameter in teacher.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    teacher.generation_config.eos_token_id = ENDS
    return teacher


def slow_targets(teacher, data):
    """One row at a time: no padding at all."""
    for row in data:
        prompt = torch.tensor([[t for t, real in zip(row["input_ids"], row["attention_mask"], strict=True) if real]])
        mask = torch.ones_like(prompt)
        written = teacher.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **OPTIONS)[0].tolist()
        target = written[1:] if teacher.config.is_encoder_decoder else written[prompt.shape[1] :]
        end = next((i for i, token in enumerate(target) if token in ENDS), len(target)) + 1
        yield prompt[0].tolist(), target[:end]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_targets_are_what_the_teacher_writes_for_each_row_alone(family, tmp_path):
    teacher, data = teacher_of(family), rows(10, kind="clm")
    made = hfc.generate_targets(teacher, data, tmp_path, batch_size=3, shard_size=4, **OPTIONS)
    lengths = set()
    for row, (prompt, target) in zip(made, slow_targets(teacher, data), strict=True):
        lengths.add(len(target))
        if family == "bart":
            assert (row["input_ids"], row["labels"]) == (prompt, target)
        else:
            assert (row["input_ids"], row["labels"]) == (prompt + target, [-100] * len(prompt) + target)
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert len(lengths) > 1 or family == "bart"  # some targets ended before the limit


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_interpolation_takes_the_text_of_the_beam_most_like_the_reference(family, tmp_path):
    teacher, data = teacher_of(family), rows(8, kind="clm")
    data = data.remove_columns("labels")
    beams, wanted = [], []
    for number, row in enumerate(data):
        prompt = torch.tensor([[t for t, real in zip(row["input_ids"], row["attention_mask"], strict=True) if real]])
        written = teacher.generate(prompt, do_sample=False, pad_token_id=0, num_return_sequences=3, **OPTIONS)
        written = written[:, 1 if family == "bart" else prompt.shape[1] :].tolist()
        ends = [next((i for i, t in enumerate(w) if t in ENDS), len(w) - 1) for w in written]
        beams.append([w[: end + 1] for w, end in zip(written, ends, strict=True)])
        wanted.append(beams[-1][number % 3])  # the reference is in the beam, at each place of it
    data = data.add_column("labels", [[-100] + w + [-100] for w in wanted])
    made = hfc.generate_targets(
        teacher, data, tmp_path / "near", batch_size=3, shard_size=4, interpolate=True, **OPTIONS
    )
    assert [[t for t in row["labels"] if t != -100] for row in made] == wanted
    assert any(w != beam[0] for w, beam in zip(wanted, beams, strict=True))  # not the most probable ones
    again = hfc.generate_targets(teacher, data, tmp_path / "near", shard_size=4, interpolate=True, **OPTIONS)
    assert again.to_list() == made.to_list()
    with pytest.raises(ValueError, match="made otherwise|with other|other"):
        hfc.generate_targets(teacher, data, tmp_path / "near", shard_size=4, **OPTIONS)
    with pytest.raises(ValueError, match="needs a column labels"):
        hfc.generate_targets(teacher, data.remove_columns("labels"), tmp_path / "no", interpolate=True, **OPTIONS)
    with pytest.raises(ValueError, match="num_beams of 2 or more, got 1"):
        hfc.generate_targets(teacher, data, tmp_path / "one", interpolate=True, num_beams=1)


def test_bleu_by_hand():
    """Of 5 tokens 4 match, of 4 pairs 2, of 3 triples 1, of 2 quadruples none; one more of each but the first."""
    expected = math.exp(1 - 6 / 5) * (4 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert sentence_bleu([1, 2, 3, 9, 4], [1, 2, 3, 4, 5, 6]) == pytest.approx(expected, rel=1e-12)
    assert sentence_bleu([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1.0, rel=1e-12)
    assert sentence_bleu([7, 8], [1, 2]) == sentence_bleu([], [1, 2]) == 0.0
    assert sentence_bleu([1, 1, 1, 1], [1, 2, 3, 4]) == pytest.approx(
        (1 / 4 * 1 / 4 * 1 / 3 * 1 / 2) ** 0.25, rel=1e-12
    )
    assert closest([[7], [1, 2], [1, 2]], [1, 2, 3]) == [1, 2]


class BartLike:
    """Writes what a summarizer does: it starts with its end token, a word, the end, padding."""

    device = torch.device("cpu")

    def __init__(self):
        self.config = tiny_model("bart").config
        self.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=1, decoder_start_token_id=2)

    def generate(self, input_ids, **options):
        return torch.tensor([[2, 0, 9, 2, 1, 1], [2, 0, 9, 8, 7, 2]])


def test_an_end_token_that_also_starts_is_kept_once():
    assert generated(BartLike(), [[0, 5, 2], [0, 6, 2]], {}) == [[0, 9, 2], [0, 9, 8, 7, 2]]


def test_a_stopped_run_goes_on_and_other_settings_are_refused(tmp_path):
    teacher, data = tiny_model("llama"), rows(10, kind="clm")
    whole = hfc.generate_targets(teacher, data, tmp_path, shard_size=4, **OPTIONS).to_list()
    (tmp_path / "part-00001.arrow").unlink()
    before = (tmp_path / "part-00000.arrow").stat().st_mtime_ns
    assert hfc.generate_targets(teacher, data, tmp_path, shard_size=4, **OPTIONS).to_list() == whole
    assert (tmp_path / "part-00000.arrow").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings: teacher was"):
        hfc.generate_targets(tiny_model("llama", seed=1), data, tmp_path, shard_size=4, **OPTIONS)
    with pytest.raises(ValueError, match="other settings: options was"):
        hfc.generate_targets(teacher, data, tmp_path, shard_size=4, num_beams=1, max_new_tokens=6)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_any_trainer_trains_on_them(family, tmp_path):
    teacher = teacher_of(family)
    made = hfc.generate_targets(teacher, rows(8, kind="clm"), tmp_path / "targets", **OPTIONS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0})), pad_token="[PAD]")
    student = tiny_model(family, seed=5)
    args = hfc.DistillationConfig(str(tmp_path), use_cpu=True, max_steps=6, per_device_train_batch_size=4, alpha=0.5,
                                  logging_steps=1, report_to="none", save_strategy="no", learning_rate=1e-2,
                                  disable_tqdm=True)  # fmt: skip
    trainer = hfc.DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=made, data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    start = trainer.evaluate(made)["eval_task_loss"]
    trainer.train()
    assert trainer.evaluate(made)["eval_task_loss"] < start


def test_what_cannot_be_generated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot generate"):
        hfc.generate_targets(tiny_model("bert"), rows(), tmp_path)
    with pytest.raises(ValueError, match=r"needs a column input_ids, it has \['text'\]"):
        hfc.generate_targets(tiny_model("llama"), Dataset.from_dict({"text": ["a"]}), tmp_path)
    with pytest.raises(ValueError, match="reads 64 positions, but the longest row of 12 tokens .* needs 140"):
        hfc.generate_targets(tiny_model("llama"), rows(kind="clm"), tmp_path)
    with pytest.raises(ValueError, match="rows without tokens"):
        hfc.generate_targets(
            tiny_model("llama"), Dataset.from_dict({"input_ids": [[5], []]}), tmp_path, max_new_tokens=2
        )
