"""A tiny model and tiny files for each task, and what its metric is, worked out by hand."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from recipe_run import tiny_folder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

LETTERS = "abcdefghij"


def sentence(i: int) -> list[str]:
    return ["the", "film", "was", "good" if i % 2 else "bad", LETTERS[i % 10]]


def text(i: int) -> str:
    return " ".join(sentence(i))


def classified(i):
    return {"text": text(i), "label": ["neg", "pos"][i % 2]}


def paired(i):
    return {"premise": text(i), "hypothesis": text(i // 2), "label": int(i % 2 == i // 2 % 2)}


def several(i):
    return {"text": text(i), "labels": ["good"] * (i % 2) + ["early"] * (i % 10 < 5)}


def in_columns(i):
    return {"text": text(i), "good": i % 2, "early": int(i % 10 < 5)}


def scored(i):
    return {"text": text(i), "score": i % 2 + i % 10 / 10}


def tagged(i):
    return {"tokens": sentence(i), "tags": ["DET", "NOUN", "VERB", "ADJ", "NOUN"]}


def asked(i):
    word = sentence(i)[3]
    return {"question": "was the film good", "context": text(i),
            "answers": {"text": [word], "answer_start": [text(i).index(word)]}}  # fmt: skip


def asked_plainly(i):
    return {"question": "was the film good", "context": text(i), "answer": sentence(i)[3]}


def chosen(i):
    return {"question": text(i), "choices": ["good", "bad"], "label": (i + 1) % 2}


def chosen_in_columns(i):
    return {"question": text(i), "choice0": "good", "choice1": "bad", "answer": "AB"[(i + 1) % 2]}


def plain(i):
    return {"text": text(i)}


def rewritten(i):
    return {"source": text(i), "target": sentence(i)[3]}


# What the metric comes to: (model, tokenizer, rows as they stand in the file) -> a number


def logits(model, tokenizer, *texts, **more):
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt", **more)).logits[0]


def accuracy(model, tokenizer, rows):
    names = model.config.id2label
    if "premise" in rows[0]:
        found = [logits(model, tokenizer, r["premise"], r["hypothesis"]).argmax().item() == r["label"] for r in rows]
    else:
        found = [names[logits(model, tokenizer, r["text"]).argmax().item()] == r["label"] for r in rows]
    return np.mean(found)


def macro_f1(model, tokenizer, rows):
    names = model.config.id2label.values()
    true = np.array([[n in r["labels"] if "labels" in r else bool(r[n]) for n in names] for r in rows])
    given = np.array([(logits(model, tokenizer, r["text"]) > 0).tolist() for r in rows])
    both, either = (true & given).sum(0), true.sum(0) + given.sum(0)
    return np.mean([2 * b / e if e else 0.0 for b, e in zip(both, either, strict=True)])


def correlation(model, tokenizer, rows):
    given = [logits(model, tokenizer, r["text"]).item() for r in rows]
    return np.corrcoef(given, [r["score"] for r in rows])[0, 1]


def tag_accuracy(model, tokenizer, rows):
    """Each word is one token here."""
    right = []
    for row in rows:
        given = logits(model, tokenizer, " ".join(row["tokens"])).argmax(-1).tolist()[1:-1]
        right += [model.config.id2label[g] == t for g, t in zip(given, row["tags"], strict=True)]
    return np.mean(right)


def answer_f1(model, tokenizer, rows):
    found = []
    for row in rows:
        answer = row["answer"] if "answer" in row else row["answers"]["text"][0]
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt")
        with torch.no_grad():
            out = model(**encoded)
        words = row["context"].split()
        first = encoded["input_ids"].shape[1] - 1 - len(words)  # the context ends before the last [SEP]
        spans = [(s, e) for s in range(len(words)) for e in range(s, len(words))]
        start, end = out.start_logits[0, first:], out.end_logits[0, first:]
        s, e = max(spans, key=lambda span: (start[span[0]] + end[span[1]]).item())
        given = [word for word in words[s : e + 1] if word not in ("a", "the")]  # articles do not count
        found.append(2 / (len(given) + 1) if answer in given else 0.0)
    return np.mean(found)


def choice_accuracy(model, tokenizer, rows):
    right = []
    for row in rows:
        choices = row.get("choices") or [row["choice0"], row["choice1"]]
        label = row["label"] if "label" in row else "AB".index(row["answer"])
        scores = []
        for choice in choices:
            batch = tokenizer(row["question"], choice, return_tensors="pt")
            with torch.no_grad():
                scores.append(model(**{n: v[:, None] for n, v in batch.items()}).logits.item())
        right.append(int(np.argmax(scores)) == label)
    return np.mean(right)


def likelihood(model, batches):
    """Minus the mean loss over all labels; of batches of one row each."""
    total, count = 0.0, 0
    for batch in batches:
        shift = "ForCausalLM" in type(model).__name__
        number = int((batch["labels"][:, 1:] if shift else batch["labels"]).ne(-100).sum())
        if number:
            with torch.no_grad():
                total += model(**batch).loss.item() * number
            count += number
    return -total / count


def causal(model, tokenizer, rows):
    ids = [token for row in rows for token in tokenizer(row["text"])["input_ids"]]
    blocks = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    return likelihood(model, [{"input_ids": torch.tensor([b]), "labels": torch.tensor([b])} for b in blocks])


def sequences(model, tokenizer, rows):
    batches = [{**tokenizer(r["source"], return_tensors="pt"),
                "labels": tokenizer(r["target"], return_tensors="pt")["input_ids"]} for r in rows]  # fmt: skip
    return likelihood(model, [{n: v for n, v in b.items() if n != "token_type_ids"} for b in batches])


def perplexity_exists(model, tokenizer, rows):
    """Which words are masked is drawn: see `test_masks_are_the_same_each_time`."""
    return


@dataclass(frozen=True)
class Case:
    task: str
    row: object  # number -> what a file holds
    form: str
    auto_class: type
    metric: str
    expected: object
    family: str = "bert"
    options: tuple = ()  # of the command line
    changes: tuple = ()  # of the config of the model that is begun with


CASES = [
    Case("sequence-classification", classified, "csv", AutoModelForSequenceClassification, "accuracy", accuracy),
    Case("sequence-classification", paired, "parquet", AutoModelForSequenceClassification, "accuracy", accuracy),
    Case("multi-label-classification", several, "jsonl", AutoModelForSequenceClassification, "macro F1", macro_f1),
    Case("multi-label-classification", in_columns, "csv", AutoModelForSequenceClassification, "macro F1", macro_f1,
         options=("--label_column", "good,early")),
    Case("regression", scored, "csv", AutoModelForSequenceClassification, "Pearson correlation", correlation,
         options=("--label_column", "score")),
    Case("token-classification", tagged, "jsonl", AutoModelForTokenClassification, "token accuracy", tag_accuracy),
    Case("question-answering", asked, "jsonl", AutoModelForQuestionAnswering, "answer F1", answer_f1),
    Case("question-answering", asked_plainly, "csv", AutoModelForQuestionAnswering, "answer F1", answer_f1),
    Case("multiple-choice", chosen, "parquet", AutoModelForMultipleChoice, "accuracy", choice_accuracy),
    Case("multiple-choice", chosen_in_columns, "csv", AutoModelForMultipleChoice, "accuracy", choice_accuracy),
    Case("masked-lm", plain, "csv", AutoModelForMaskedLM, "log-likelihood per token", perplexity_exists),
    Case("causal-lm", plain, "jsonl", AutoModelForCausalLM, "log-likelihood per token", causal, family="llama"),
    Case("seq2seq-lm", rewritten, "csv", AutoModelForSeq2SeqLM, "log-likelihood per token", sequences, family="t5"),
]  # fmt: skip


def write(file: Path, rows: list[dict]) -> None:
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def source_of(case: Case, folder: Path) -> Path:
    """A folder of train, validation and test files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", range(24)), ("validation", range(24, 30)), ("test", range(30, 40))):
        write(folder / f"{name}.{case.form}", [case.row(i) for i in numbers])
    return folder


def model_of(case: Case, folder: Path) -> Path:
    """What users begin with: an encoder that was pretrained, a language model."""
    tasks = {"llama": "clm", "t5": "seq2seq"}
    return tiny_folder(folder, case.family, task=tasks.get(case.family, "mlm"))
