"""Questions whose answers stand in a text, as SQuAD keeps them."""

from typing import Any

from datasets import Features, Value

from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.tasks.task import Task, find_columns, for_training, text_in

COLUMNS = {
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph", "document", "text"),
    "answers": ("answers", "answer", "answer_text"),
}
BEHIND = 2**31 - 1  # a place behind every text: the loss passes over it


class QuestionAnswering(Task):
    """A row's answers are a list of texts, a text, or SQuAD's `{"text": [...], "answer_start": [...]}`."""

    name = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    endings = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
    predicts = "answers"
    needs = "a question, a context and answers that stand in it (question, context, answers)"
    features = Features({"question": Value("string"), "context": Value("string"), "answers": [Value("string")],
                         "start": Value("int64")})  # fmt: skip

    def find(self, columns, source, options):
        texts = (options.text_column or ",").split(",")
        if len(texts) != 2:
            raise RecipeError(f"text_column of {self.name} names the question and the context, got {texts}.")
        given = dict(zip(COLUMNS, [*(name or None for name in texts), options.label_column], strict=True))
        found = find_columns(self, COLUMNS, given, columns, source)
        return {**found, **({"start": "answer_start"} if "answer_start" in columns else {})}

    def row(self, given, columns):
        question, context = (text_in(given[columns[name]], columns[name]) for name in ("question", "context"))
        if not question or not context:
            return None
        answers, starts = _texts_and_starts(given[columns["answers"]], columns["answers"])
        start = given[columns["start"]] if "start" in columns else starts[0] if starts else None
        if not answers:
            return {"question": question, "context": context, "answers": [], "start": -1}
        start = -1 if start in (None, "") else _whole(start, columns.get("start", columns["answers"]))
        if context[max(start, 0) :][: len(answers[0])] != answers[0]:
            start = context.find(answers[0])
        return None if start < 0 else {"question": question, "context": context, "answers": answers, "start": start}

    def texts(self, row):
        return iter((row["question"], row["context"]))

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        """Texts are cut at the end of the context. An answer that is cut off is not learned, and counts as missed."""
        if not tokenizer.is_fast:
            raise RecipeError(f"{self.name} needs a fast tokenizer, which knows where its tokens stand in a text.")

        def encode(rows):
            encoded = tokenizer(rows["question"], rows["context"], truncation="only_second", max_length=max_length,
                                return_offsets_mapping=True)  # fmt: skip
            spans = encoded.pop("offset_mapping")
            places = [[span if part == 1 else None for span, part in zip(own, encoded.sequence_ids(i), strict=True)]
                      for i, own in enumerate(spans)]  # fmt: skip
            found = {**encoded, "start_positions": [], "end_positions": []}
            for own, answers, start in zip(places, rows["answers"], rows["start"], strict=True):
                first, last = (0, 0) if not answers else _tokens(own, start, start + len(answers[0]))
                found["start_positions"].append(first)
                found["end_positions"].append(last)
            return {**found, "offset_mapping": places, "answers": rows["answers"], "context": rows["context"]}

        columns = texts.splits["train"].column_names
        encoded = texts.splits.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")
        return encoded if measured else for_training(encoded, ["offset_mapping", "answers", "context"])


def _texts_and_starts(given: Any, column: str) -> tuple[list[str], list | None]:
    """The answers and where they begin: of a text, a list of texts, SQuAD's mapping, or a list of such mappings."""
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, dict) for one in given):
        given = {key: [one.get(key) for one in given] for key in ("text", "answer_start")}
    starts = given.get("answer_start") if isinstance(given, dict) else None
    texts = given.get("text") if isinstance(given, dict) else given
    texts = texts if isinstance(texts, (list, tuple)) else [] if texts is None else [texts]
    if (isinstance(given, dict) and "text" not in given) or any(isinstance(t, (list, tuple, dict)) for t in texts):
        raise RecipeError(
            f'The column {column!r} must hold a text, a list of texts or {{"text": [...], "answer_start": [...]}}, and '
            f"holds {given!r:.60}."
        )
    starts = starts if isinstance(starts, (list, tuple)) else None if starts is None else [starts]
    starts = [one for one in starts or [] if one is not None]
    return [str(text) for text in texts if text not in (None, "")], starts or None


def _whole(start: Any, column: str) -> int:
    try:
        return int(start)
    except (TypeError, ValueError):
        raise RecipeError(f"The answer's place in {column!r} must be a whole number, and is {start!r:.60}.") from None


def _tokens(places: list, start: int, end: int) -> tuple[int, int]:
    """The first and last token of the characters from `start` up to `end`; BEHIND where they are not all there."""
    inside = [i for i, span in enumerate(places) if span is not None and span[0] < end and span[1] > start]
    is_whole = inside and places[inside[0]][0] <= start and places[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if is_whole else (BEHIND, BEHIND)
