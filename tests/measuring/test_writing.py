"""What models write: ROUGE of it, and how many tokens a second."""

import pytest
import torch
from helpers import tiny_batch, tiny_model
from recipe_run import tiny_folder
from transformers import AutoTokenizer

import hf_compress as hfc
from hf_compress.measuring.decoding import DECODED, prompt_of, write
from hf_compress.measuring.quality import example_scores
from hf_compress.measuring.rouge import rouge, rouge_scores
from hf_compress.model.reading import PaddingCollator

PAIRS = [  # given, target, F1 of ROUGE-1, ROUGE-2 and ROUGE-L
    ("the cat sat", "the cat sat", (1, 1, 1)),
    ("The cat, sat!", "the cat sat", (1, 1, 1)),
    ("police killed the gunman", "the gunman killed police", (1, 1 / 3, 1 / 2)),
    ("a b c d", "b d x", (4 / 7, 0, 4 / 7)),
    ("the the the", "the cat", (2 / 5, 0, 2 / 5)),
    ("one", "one two", (2 / 3, 0, 2 / 3)),
    ("", "something", (0, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize("given, target, expected", PAIRS)
def test_rouge_of_pairs_worked_out_by_hand(given, target, expected):
    assert rouge_scores(given, target) == pytest.approx(expected)


def test_rouge_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    chance = torch.Generator().manual_seed(0)
    words = ["film", "good", "Bad,", "not", "x2", "the-end", "it's", "Ünder"]
    for _ in range(300):
        texts = [" ".join(words[i] for i in torch.randint(8, (n,), generator=chance)) for n in
                 torch.randint(0, 12, (2,), generator=chance).tolist()]  # fmt: skip
        found = scorer.score(texts[1], texts[0])
        assert rouge_scores(*texts) == pytest.approx([found[n].fmeasure for n in ("rouge1", "rouge2", "rougeL")])


def test_a_model_is_scored_by_what_it_writes(tmp_path):
    """Against generating for each row by itself."""
    folder = tiny_folder(tmp_path, "t5", task="seq2seq")
    model, tokenizer = tiny_model("t5", "seq2seq"), AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": tokenizer(text)["input_ids"], "labels": [5], "target": text} for text in
            ("the film was good", "bad", "not the film")]  # fmt: skip
    metric = rouge(tokenizer, most_tokens=5)
    found = example_scores(model, rows, PaddingCollator(tokenizer), metric=metric, batch_size=2)
    for scores, row in zip(found, rows, strict=True):
        with torch.no_grad():
            ids = model.generate(torch.tensor([row["input_ids"]]), max_new_tokens=5, do_sample=False)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert scores.tolist() == pytest.approx(rouge_scores(text, row["target"]))
    assert metric.total(found).item() == pytest.approx(found[:, 2].mean().item())


@pytest.mark.parametrize("family, task", [("gpt2", "clm"), ("llama", "clm"), ("t5", "seq2seq"), ("bart", "seq2seq")])
def test_writers_are_timed_and_write_what_is_likeliest(family, task):
    model = tiny_model(family, task)
    batch = {name: value[:1] for name, value in tiny_batch(model, padding=False).items()}
    prompt = prompt_of(model, batch)
    ids = write(model, prompt)
    start = 1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    assert ids.shape == (1, start + DECODED)
    eos = model.generation_config.eos_token_id
    for place in range(start, start + 4):  # by one forward each, without a cache
        read = {"decoder_input_ids": ids[:, :place]} if model.config.is_encoder_decoder else {}
        read |= {"input_ids": prompt["input_ids"] if read else ids[:, :place]}
        with torch.no_grad():
            logits = model(**read, use_cache=False).logits[0, -1]
        if eos is not None:
            logits[eos] = -torch.inf  # not before all are written
        assert ids[0, place] == logits.argmax()
    measured = hfc.measure(model, sequence_length=8, latency_rounds=1, throughput_rounds=2)
    assert measured.decoding.median > 0 and len(measured.decoding.samples) == 2


def test_encoders_do_not_write_and_long_prompts_leave_room():
    model = tiny_model("bert")
    assert prompt_of(model, tiny_batch(model)) is None
    assert hfc.measure(model, sequence_length=8, latency_rounds=1, throughput_rounds=1).decoding is None
    model = tiny_model("gpt2", "clm")  # of 64 positions
    assert prompt_of(model, tiny_batch(model, batch=1, length=64))["input_ids"].shape[1] == 64 - DECODED


def test_the_report_tells_how_fast_decoders_write(tmp_path):
    models = {"all": tiny_model("gpt2", "clm"), "half": tiny_model("gpt2", "clm", num_hidden_layers=2)}
    report = hfc.compare(models, sequence_length=8, latency_rounds=2, throughput_rounds=2)
    assert report.from_json(report.to_json()) == report
    report.save(tmp_path)
    assert "tokens/s" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "decode_tokens_per_second" in (tmp_path / "report.csv").read_text(encoding="utf-8").splitlines()[0]
