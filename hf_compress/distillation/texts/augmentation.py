"""TinyBERT's data augmentation: copies of each text with some of its words replaced.

Jiao et al., 2020, https://arxiv.org/abs/1909.10351, algorithm 1. As in the released code, the candidates of a word are
found once, in the text as it stands, and serve all copies. Unlike there, a word is never a candidate for itself, and
no list of stop words is left out.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, Value, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.distillation.teachers.cache_files import teacher_fingerprint, tokenizer_fingerprint
from hf_compress.distillation.teachers.shards import Shards, data_fingerprint, row_ranges
from hf_compress.distillation.texts.proposals import (
    MaskedWords,
    ModelNeighbours,
    Neighbours,
    Vocabulary,
    Word,
    find_words,
    written_like,
)
from hf_compress.training.progress import progress_bar

ROWS_PER_SHARD = 500
MARKS = {"original_row": Value("int64"), "is_augmented": Value("bool")}


def augment(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    masked_lm: PreTrainedModel | None = None,
    word_vectors: PreTrainedModel | str | Path | None = None,
    path: str | Path | None = None,
    text_columns: str | Sequence[str] = "text",
    copies: int = 20,
    probability: float = 0.4,
    num_candidates: int = 15,
    keep_frequent: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Dataset:
    """Each row of `dataset`, followed by up to `copies` copies of it with other words, the same for the same `seed`.

    A word is replaced with `probability` by one of `num_candidates`: where it is one token, words that `masked_lm`
    expects in its place; else, and everywhere without `masked_lm`, its nearest neighbours in `word_vectors`. Copies
    that came out alike are dropped. All columns are kept and two are added: `original_row`, and `is_augmented`, True
    for a copy. A copy has the label of its original, which a new word may have made wrong: let the teacher label it
    (`alpha=1`).

    Args:
        tokenizer: that of `masked_lm` and of `word_vectors`, where this is a model.
        word_vectors: a model, whose input embeddings are the vectors, or a file in GloVe's text format; when not given,
            the embeddings of `masked_lm`.
        path: a folder to write to, part by part: a call that was stopped goes on there, a finished one is only read.
        text_columns: several are replaced together, as the two texts of a pair.
        keep_frequent: so many of the most frequent words of the dataset stay as they are, as stop words do in the
            released code: word vectors alone know no grammar.
        batch_size: masked texts in a forward of `masked_lm`.
        num_workers: processes that share the work; 0 for this one alone. With more, `masked_lm` has to be on the CPU.

    Raises ValueError for columns, a model or a folder that do not fit.
    """
    columns = [text_columns] if isinstance(text_columns, str) else list(text_columns)
    _check(dataset, columns, masked_lm, word_vectors, copies, probability, num_candidates, keep_frequent, num_workers)
    vectors = masked_lm if word_vectors is None else word_vectors
    ranges, shards = row_ranges(len(dataset), ROWS_PER_SHARD), None
    missing = range(len(ranges))
    if path is not None:
        settings = {
            "data": data_fingerprint(dataset.iter(ROWS_PER_SHARD)),
            "masked_lm": None if masked_lm is None else teacher_fingerprint(masked_lm),
            "word_vectors": _identity(vectors),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "text_columns": columns,
            "copies": copies,
            "probability": probability,
            "num_candidates": num_candidates,
            "keep_frequent": keep_frequent,
            "seed": seed,
        }
        shards = Shards(path, settings, num_rows=len(dataset), rows_per_shard=ROWS_PER_SHARD)
        missing = shards.missing
    if not missing:
        return shards.load()
    vocabulary = Vocabulary(tokenizer)
    augmentation = Augmentation(
        tokenizer,
        None if masked_lm is None else MaskedWords(masked_lm, vocabulary, batch_size),
        columns=columns,
        copies=copies,
        probability=probability,
        num_candidates=num_candidates,
        seed=seed,
    )
    is_model = isinstance(vectors, PreTrainedModel)
    neighbours = ModelNeighbours(vectors, vocabulary) if is_model else Neighbours.of_file(vectors)
    augmentation.learn_words(dataset, neighbours, keep_frequent)
    parts = _Parts(dataset, augmentation, ranges)
    progress = progress_bar(total=sum(len(ranges[i]) for i in missing), desc="Augmenting", unit="text")
    made = []
    for number, part in zip(missing, DataLoader(parts, None, sampler=missing, num_workers=num_workers), strict=True):
        made.append(part) if shards is None else shards.write(number, part)
        progress.update(len(ranges[number]))
    progress.close()
    return concatenate_datasets(made) if shards is None else shards.load()


@dataclass
class Augmentation:
    """Finds candidates for the words of texts, and draws copies from them."""

    tokenizer: PreTrainedTokenizerBase
    masked_words: MaskedWords | None
    columns: list[str]
    copies: int
    probability: float
    num_candidates: int
    seed: int
    kept: set[str] = field(default_factory=set)  # words in lower case that are never replaced
    nearest: dict[str, list[str]] = field(default_factory=dict)  # neighbours of words, as `learn_words` finds them

    def learn_words(self, dataset: Dataset, neighbours: Neighbours, keep_frequent: int) -> None:
        """Look up, once, the neighbours of the words that no masked language model is asked about."""
        counts: Counter[str] = Counter()
        without_place = set()
        for rows in dataset.iter(ROWS_PER_SHARD):
            for texts in (rows[name] for name in self.columns):
                for text, words in zip(texts, self.words(texts)[1], strict=True):
                    counts.update(text[w.start : w.end].lower() for w in words)
                    asked = self.masked_words is not None
                    without_place |= {text[w.start : w.end] for w in words if not asked or w.position is None}
        self.kept = {word for word, _ in counts.most_common(keep_frequent)}
        self.nearest = neighbours.candidates(
            (w for w in without_place if w.lower() not in self.kept), self.num_candidates
        )

    def words(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[Word]]]:
        return find_words(self.tokenizer, texts, truncation=self.masked_words is not None)

    def candidates(self, texts: Sequence[str]) -> list[list[tuple[Word, list[str]]]]:
        """The words of each text that can be replaced, with what can replace them."""
        input_ids, words = self.words(texts)
        words = [
            [w for w in own if text[w.start : w.end].lower() not in self.kept]
            for text, own in zip(texts, words, strict=True)
        ]
        expected = {}
        if self.masked_words is not None:
            places = [(i, w.position) for i, own in enumerate(words) for w in own if w.position is not None]
            expected = self.masked_words.candidates(input_ids, places, self.num_candidates)
        result: list[list[tuple[Word, list[str]]]] = [[] for _ in texts]
        for i, (text, own) in enumerate(zip(texts, words, strict=True)):
            for word in own:
                written = text[word.start : word.end]
                others = expected[i, word.position] if (i, word.position) in expected else self.nearest.get(written)
                if others:
                    result[i].append((word, [written_like(written, other) for other in others]))
        return result

    def part(self, rows: dict[str, list], first_row: int, features: Features) -> Dataset:
        """Rows and their copies; `first_row` is the number of the first one."""
        candidates = [self.candidates(rows[name]) for name in self.columns]
        made: dict[str, list] = {name: [] for name in (*rows, *MARKS)}
        for i in range(len(rows[self.columns[0]])):
            draw = random.Random(f"{self.seed}-{first_row + i}")
            original = tuple(rows[name][i] for name in self.columns)
            texts = dict.fromkeys([original])
            for _ in range(self.copies):
                texts[tuple(self._copy(t, c[i], draw) for t, c in zip(original, candidates, strict=True))] = None
            for name in rows:
                made[name] += [rows[name][i]] * len(texts)
            for name, column in zip(self.columns, zip(*texts, strict=True), strict=True):
                made[name][-len(texts) :] = column
            made["original_row"] += [first_row + i] * len(texts)
            made["is_augmented"] += [False] + [True] * (len(texts) - 1)
        return Dataset.from_dict(made, features=Features({**features, **MARKS}))

    def _copy(self, text: str, candidates: list[tuple[Word, list[str]]], draw: random.Random) -> str:
        pieces, end = [], 0
        for word, others in candidates:
            if draw.random() < self.probability:
                pieces += [text[end : word.start], draw.choice(others)]
                end = word.end
        return "".join([*pieces, text[end:]])


def _identity(vectors: PreTrainedModel | str | Path) -> str | list:
    if isinstance(vectors, PreTrainedModel):
        return teacher_fingerprint(vectors.get_input_embeddings())
    return [Path(vectors).name, Path(vectors).stat().st_size]


class _Parts:
    """The augmented parts of a dataset by number, for the worker processes of a `DataLoader`."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, ranges: list[range]):
        self.dataset, self.augmentation, self.ranges = dataset, augmentation, ranges

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, number: int) -> Dataset:
        rows = self.ranges[number]
        return self.augmentation.part(self.dataset[rows.start : rows.stop], rows.start, self.dataset.features)


def _check(
    dataset, columns, masked_lm, word_vectors, copies, probability, num_candidates, keep_frequent, num_workers
) -> None:
    if masked_lm is None and word_vectors is None:
        raise ValueError(
            "augment needs words to choose from: pass masked_lm, or word_vectors (a model for its input embeddings, or "
            "a file in GloVe's text format)."
        )
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: expected at least one text.")
    for name in columns:
        if name not in dataset.column_names or dataset.features[name].dtype not in ("string", "large_string"):
            kinds = {n: str(getattr(f, "dtype", f)) for n, f in dataset.features.items()}
            raise ValueError(f"text_columns must name columns of texts, got {name!r}; the dataset has {kinds}.")
        if None in dataset[name]:
            raise ValueError(f"The column {name!r} has rows without a text: leave them out with dataset.filter.")
    if taken := sorted(MARKS.keys() & set(dataset.column_names)):
        raise ValueError(f"The dataset already has the columns {taken}, which augment adds. Rename or remove them.")
    if copies < 1 or num_candidates < 1 or keep_frequent < 0 or not 0 < probability <= 1:
        raise ValueError(
            "copies and num_candidates must be 1 or more, keep_frequent 0 or more, and probability above 0 and at most "
            f"1, got {copies}, {num_candidates}, {keep_frequent} and {probability}."
        )
    if num_workers and masked_lm is not None and masked_lm.device.type != "cpu":
        raise ValueError(
            f"num_workers={num_workers} processes cannot share masked_lm on {masked_lm.device}: set num_workers=0, or "
            "move it to the CPU."
        )
