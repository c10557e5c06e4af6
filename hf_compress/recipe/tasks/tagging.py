"""A tag for each word of a text: names, parts of speech."""

from itertools import chain

from datasets import Features, Value
from transformers import PretrainedConfig

from hf_compress.model.reading import IGNORED
from hf_compress.recipe.labels import in_order, numbers_in, written
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.tasks.task import Task, find_columns, labels_head

WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels", "label", "pos_tags", "chunk_tags")


class Tagging(Task):
    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    endings = ("ForTokenClassification",)
    predicts = "tags"
    needs = "lists of words and of their tags (tokens, tags)"
    features = Features({"words": [Value("string")], "tags": [Value("string")]})

    def find(self, columns, source, options):
        given = {"words": options.text_column, "tags": options.label_column}
        return find_columns(self, {"words": WORDS, "tags": TAGS}, given, columns, source)

    def row(self, given, columns):
        words, tags = given[columns["words"]], given[columns["tags"]]
        if words is None or tags is None:
            return None
        if not isinstance(words, (list, tuple)) or not isinstance(tags, (list, tuple)):
            raise RecipeError(
                f"The columns {list(columns.values())} must hold lists and hold {words!r:.60} and {tags!r:.60}: "
                f"{self.name} needs {self.needs}, as JSON lines or parquet keep them."
            )
        if len(words) != len(tags):
            raise RecipeError(f"{len(words)} words and {len(tags)} tags: {words!r:.80}.")
        tags = [written(tag) for tag in tags]
        return None if not words or None in tags else {"words": [str(word) for word in words], "tags": tags}

    def names(self, train, options, source):
        found = set(chain.from_iterable(train["tags"]))
        names, shared = (list(options.label_names), True) if options.label_names else in_order(found, source)
        if len(found) < 2 or (found - set(names) and not options.label_names):
            raise RecipeError(f"{source} has the tags {sorted(found)}: two or more are needed.")
        are_numbers = all(tag.isdigit() and int(tag) < len(names) for tag in found)
        if (unknown := sorted(found - set(names))) and not are_numbers:
            raise RecipeError(f"label_names are {names}, but {source} has also {unknown}.")
        return names, shared

    def check_held_out(self, rows, train, names, where):
        found = set(chain.from_iterable(rows["tags"]))
        are_numbers = all(tag.isdigit() for tag in set(chain.from_iterable(train["tags"])))
        known = {*names, *(map(str, range(len(names))) if are_numbers else ())}
        if unknown := sorted(found - known):
            raise RecipeError(f"{where} has tags {unknown} that its train split has not.")

    def texts(self, row):
        return iter(row["words"])

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        """The first token of each word has its tag; the others, and special ones, are not counted."""
        if not tokenizer.is_fast:
            raise RecipeError(f"{self.name} needs a fast tokenizer, which knows where its tokens stand in a text.")
        numbers = list(range(len(texts.names))) if config is None else self.numbers(config, texts)
        if numbers is None:
            raise RecipeError(f"The model {self.misfit(config, texts)}.")
        places = {name: number for name, number in zip(texts.names, numbers, strict=True)}
        places |= {str(i): number for i, number in enumerate(numbers)} if texts.shared_order else {}

        def encode(rows):
            joined = [" ".join(words) for words in rows["words"]]
            encoded = tokenizer(joined, truncation=True, max_length=max_length, return_offsets_mapping=True)
            labels = []
            for words, tags, spans in zip(rows["words"], rows["tags"], encoded.pop("offset_mapping"), strict=True):
                labels.append(_first_tokens(words, [places[tag] for tag in tags], spans))
            return {**encoded, "labels": labels}

        columns = texts.splits["train"].column_names
        return texts.splits.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")

    def numbers(self, config: PretrainedConfig, texts) -> list[int] | None:
        return numbers_in(config, texts.names, shared_order=texts.shared_order)

    def fits(self, config, texts):
        return self.has_head(config) and self.numbers(config, texts) is not None

    def head(self, texts):
        return labels_head(texts.names)

    def of_teacher(self, config):
        return labels_head(config.id2label)

    def misfit(self, config, texts):
        if not self.has_head(config):
            return super().misfit(config, texts)
        return f"predicts the tags {list(config.id2label.values())}, but {texts.source} has {texts.names}"


def _first_tokens(words: list[str], tags: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """The tag of a word at its first token, IGNORED elsewhere. `spans` are of the words joined by spaces."""
    joined = " ".join(words)
    word_at = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]
    seen, labels = set(), []
    for start, end in spans:
        while start < end and joined[start] == " ":
            start += 1
        number = word_at[start] if start < end else None
        labels.append(IGNORED if number is None or number in seen else tags[number])
        seen.add(number)
    return labels
