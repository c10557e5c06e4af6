"""A question and several answers, of which one is right."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Features, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_compress.model.reading import PaddingCollator
from hf_compress.recipe.labels import written
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.tasks.task import Task, find_columns, text_in

PROMPTS = ("question", "prompt", "text", "sentence", "premise", "sent1", "query", "context")
LISTS = ("choices", "options", "endings", "candidates")
LABELS = ("label", "labels", "answer", "answerkey", "correct", "gold")
NUMBERED = re.compile(r"(choice|option|ending|answer)[ _]?(\d+|[a-e])", re.IGNORECASE)


class MultipleChoice(Task):
    """Choices are a list, or columns choice0, choice1, ...; a label is a number from 0, a letter or a text."""

    name = "multiple-choice"
    auto_class = "AutoModelForMultipleChoice"
    endings = ("ForMultipleChoice",)
    predicts = "choices"
    needs = "a question, its choices (a list, or choice0, choice1, ...) and a label (question, choices, label)"
    label_column_help = "choices_column and label_column"
    pads = True
    features = Features({"text": Value("string"), "choices": [Value("string")], "label": Value("int64")})

    def find(self, columns, source, options):
        given = {"text": options.text_column, "label": options.label_column, "choices": options.choices_column}
        numbered = sorted((c for c in columns if NUMBERED.fullmatch(c.strip())), key=_order)
        wanted = {"text": PROMPTS, "choices": LISTS, "label": LABELS}
        own = options.choices_column.split(",") if options.choices_column else []
        if len(own) > 1 or (not own and numbered and not {c.strip().lower() for c in columns} & set(LISTS)):
            found = find_columns(self, {n: wanted[n] for n in ("text", "label")}, {**given, "choices": None}, columns,
                                 source)  # fmt: skip
            return {**found, **{f"choice {number}": name for number, name in enumerate(own or numbered)}}
        return find_columns(self, wanted, given, columns, source)

    def row(self, given, columns):
        choices = given[columns["choices"]] if "choices" in columns else [
            given[own] for usual, own in columns.items() if usual.startswith("choice ")]  # fmt: skip
        marks = (
            choices.get("label") if isinstance(choices, Mapping) else None
        )  # of each, as ARC has them: A to D, 1 to 4
        choices = choices.get("text") if isinstance(choices, Mapping) else choices
        if choices is None and given.get(columns.get("choices")) is None:
            return None
        if not isinstance(choices, (list, tuple)) or any(isinstance(one, (list, tuple, dict)) for one in choices):
            raise RecipeError(
                f"The column {columns['choices']!r} must hold lists of texts, and holds "
                f"{given[columns['choices']]!r:.60}."
            )
        choices = [str(one) for one in choices if one not in (None, "")]
        text, label = text_in(given[columns["text"]], columns["text"]), given[columns["label"]]
        label = written(None if isinstance(label, (list, tuple)) and not label else label)
        if not text or label is None or len(choices) < 2:
            return None
        are_marked = isinstance(marks, (list, tuple)) and len(marks) == len(choices)
        marks = [written(mark) for mark in marks] if are_marked else []
        number = marks.index(label) if label in marks else _number(label, choices)
        if number is None:
            raise RecipeError(
                f"The label {label!r} of {text!r:.60} is none of its {len(choices)} choices: a number from 0, a letter "
                "from A, or the text of one."
            )
        return {"text": text, "choices": choices, "label": number}

    def names(self, train, options, source):
        sizes = {len(choices) for choices in train["choices"]}
        if len(sizes) > 1:
            raise RecipeError(f"Every row of {source} needs as many choices, but they have {sorted(sizes)}.")
        return [], True

    def check_held_out(self, rows, train, names, where):
        size = len(train[0]["choices"])
        if sizes := sorted({len(choices) for choices in rows["choices"]} - {size}):
            raise RecipeError(f"{where} has rows of {sizes} choices, but its train split has {size} in each.")

    def texts(self, row):
        return iter((row["text"], *row["choices"]))

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        def encode(row):
            pairs = ([row["text"]] * len(row["choices"]), row["choices"])
            encoded = tokenizer(*pairs, truncation=True, max_length=max_length, padding=True)
            return {**encoded, "labels": row["label"]}

        columns = texts.splits["train"].column_names
        return texts.splits.map(encode, remove_columns=columns, desc="Tokenizing")

    def collator(self, tokenizer):
        return ChoicesCollator(tokenizer)


@dataclass(frozen=True)
class ChoicesCollator:
    """A batch (B, C, T) of rows that hold C texts each."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        labels = [{"labels": row["labels"]} for row in rows if "labels" in row]
        texts = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        size = len(texts[0]["input_ids"])
        flat = [{name: value[i] for name, value in row.items()} for row in texts for i in range(size)]
        batch = {name: value.unflatten(0, (-1, size)) for name, value in PaddingCollator(self.tokenizer)(flat).items()}
        if labels:
            batch["labels"] = torch.tensor([row["labels"] for row in labels])
        return batch


def _order(column: str) -> tuple[int, str]:
    mark = NUMBERED.fullmatch(column.strip())[2].lower()
    return (int(mark), "") if mark.isdigit() else (0, mark)


def _number(label: str, choices: Sequence[str]) -> int | None:
    if label in choices:
        return choices.index(label)
    found = (
        int(float(label)) if re.fullmatch(r"\d+(\.0*)?", label) else ord(label.upper()) - 65 if len(label) == 1 else -1
    )
    return found if 0 <= found < len(choices) else None
