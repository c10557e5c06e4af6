"""Words that may take a word's place: what a masked language model expects there, or the nearest word vectors."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.distillation.heads import head_only_on
from hf_compress.measuring.measure import evaluating
from hf_compress.model.inputs import forward_names

LETTERS = re.compile(r"[^\W\d_]+")
ROWS_AT_ONCE = 512  # words compared with all others together, to bound memory
MOST_PIECES = 4  # of a word whose vector their mean still is: a sentence without spaces is a run of letters, too
BEFORE = "a"  # a word is looked up behind another one: byte-pair encodings spell the first word of a text differently


class Word(NamedTuple):
    """A run of letters in a text, and where its token stands; None for a word of several pieces."""

    start: int
    end: int
    position: int | None


def find_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, truncation: bool = False
) -> tuple[list[list[int]], list[list[Word]]]:
    """The token ids of each text, and its words in order."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot say where its tokens stand in a text. Load the fast one with "
            "AutoTokenizer."
        )
    encoded = tokenizer(list(texts), truncation=truncation, return_offsets_mapping=True, verbose=False)
    words = []
    for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
        pieces = {}  # span in the text, without spaces -> position of the token
        for position, (start, end) in enumerate(offsets):
            if piece := text[start:end].strip():
                start += text[start:end].index(piece)
                pieces[start, start + len(piece)] = position
        words.append([Word(*m.span(), pieces.get(m.span())) for m in LETTERS.finditer(text)])
    return encoded["input_ids"], words


class Vocabulary:
    """The tokens of a tokenizer that are whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def pieces(self, words: Sequence[str]) -> list[list[int]]:
        """The token ids of each word inside a text; nothing for no words, which a tokenizer does not take."""
        if not words:
            return []
        before = len(self.tokenizer(BEFORE, add_special_tokens=False)["input_ids"])
        encoded = self.tokenizer([f"{BEFORE} {word}" for word in words], add_special_tokens=False)
        return [ids[before:] for ids in encoded["input_ids"]]

    @cached_property
    def words(self) -> dict[int, str]:
        """Token id -> the word that it spells alone."""
        ids = [i for i in range(len(self.tokenizer)) if i not in self.tokenizer.all_special_ids]
        texts = [text.strip() for text in self.tokenizer.batch_decode([[i] for i in ids])] if ids else []
        spelled = [(i, text) for i, text in zip(ids, texts, strict=True) if LETTERS.fullmatch(text)]
        pieces = self.pieces([text for _, text in spelled])
        return {i: text for (i, text), own in zip(spelled, pieces, strict=True) if own == [i]}


class Neighbours:
    """The nearest words of a word: the highest cosine among the vectors (V, D) of `words`."""

    def __init__(self, words: Sequence[str], vectors: Tensor):
        self.words, self.vectors = list(words), F.normalize(vectors.float(), dim=-1)
        self.rows = {word: row for row, word in reversed(list(enumerate(self.words)))}

    @staticmethod
    def of_file(path: str | Path) -> "Neighbours":
        """Read GloVe's text format: a word and its numbers in each line."""
        words, rows = [], []
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                word, *values = line.rstrip().split(" ")
                if number == 1 and len(values) == 1:
                    continue  # word2vec's first line: the number of words and their width
                try:
                    row = torch.tensor([float(v) for v in values])
                except ValueError:
                    row = torch.empty(0)
                if len(row) == 0 or (rows and len(row) != len(rows[0])):
                    expected = f"{len(rows[0])} numbers" if rows else "numbers"
                    raise ValueError(
                        f"{path}, line {number}: expected a word and {expected}, got {line.rstrip()[:60]!r}."
                    )
                words.append(word)
                rows.append(row)
        if not rows:
            raise ValueError(f"{path} has no word vectors: expected a word and its numbers in each line.")
        return Neighbours(words, torch.stack(rows))

    def query(self, words: Sequence[str]) -> tuple[list[str], Tensor]:
        """The words that have a vector, as written or in lower case, and their vectors."""
        known = [(word, self.rows.get(word, self.rows.get(word.lower()))) for word in words]
        known = [(word, row) for word, row in known if row is not None]
        return [word for word, _ in known], self.vectors[[row for _, row in known]]

    def candidates(self, words: Iterable[str], count: int) -> dict[str, list[str]]:
        """The `count` nearest words of each word, nearest first, itself left out."""
        known, vectors = self.query(sorted(set(words)))
        found = {}
        for start in range(0, len(known), ROWS_AT_ONCE):
            part = known[start : start + ROWS_AT_ONCE]
            similarity = vectors[start : start + ROWS_AT_ONCE] @ self.vectors.T  # (rows, V)
            nearest = similarity.topk(min(count + 4, len(self.words)), dim=-1).indices.tolist()
            for word, row in zip(part, nearest, strict=True):
                others = dict.fromkeys(w for i in row if (w := self.words[i]).lower() != word.lower())
                found[word] = list(others)[:count]
        return found


class ModelNeighbours(Neighbours):
    """Word vectors from the input embeddings of a model; a word of a few pieces is the mean of them."""

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.embeddings = model.get_input_embeddings().weight.detach().float().cpu()
        ids = list(vocabulary.words)
        super().__init__(list(vocabulary.words.values()), self.embeddings[ids])

    def query(self, words: Sequence[str]) -> tuple[list[str], Tensor]:
        unknown, known = self.vocabulary.tokenizer.unk_token_id, {}
        for word, ids in zip(words, self.vocabulary.pieces(words), strict=True):
            if 0 < len(ids) <= MOST_PIECES and unknown not in ids:
                known[word] = self.embeddings[ids].mean(dim=0)
        vectors = list(known.values())
        return list(known), F.normalize(torch.stack(vectors), dim=-1) if vectors else self.vectors[:0]


class MaskedWords:
    """What a masked language model expects in the place of a word, among the words that are one token."""

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary, batch_size: int):
        self.model, self.vocabulary, self.batch_size = model, vocabulary, batch_size
        self.tokenizer = vocabulary.tokenizer
        self.ids = torch.tensor(list(vocabulary.words), dtype=torch.long)  # also of none
        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"{type(self.tokenizer).__name__} has no mask token, which a masked language model needs.")

    @torch.no_grad()
    def candidates(
        self, input_ids: list[list[int]], places: list[tuple[int, int]], count: int
    ) -> dict[tuple[int, int], list[str]]:
        """The `count` most probable words at each of `places` (text, position), masked one at a time."""
        words = list(self.vocabulary.words.values())
        order = sorted(places, key=lambda place: len(input_ids[place[0]]))  # texts of a length together: little padding
        found = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            logits = self._logits([input_ids[text] for text, _ in batch], [position for _, position in batch])
            logits = logits[:, self.ids.to(logits.device)].float().cpu()  # (batch, words)
            best = logits.topk(min(count + 1, len(words)), dim=-1).indices.tolist()
            for (text, position), row in zip(batch, best, strict=True):
                own = input_ids[text][position]
                others = [words[i] for i in row if self.ids[i] != own]
                found[text, position] = others[:count]
        return found

    def _logits(self, texts: list[list[int]], positions: list[int]) -> Tensor:
        masked = [
            [*ids[:p], self.tokenizer.mask_token_id, *ids[p + 1 :]] for ids, p in zip(texts, positions, strict=True)
        ]
        batch = self.tokenizer.pad({"input_ids": masked}, padding_side="right", return_tensors="pt")
        inputs = {k: v.to(self.model.device) for k, v in batch.items() if k in forward_names(self.model)}
        rows = torch.arange(len(texts), device=self.model.device)
        columns = torch.tensor(positions, device=self.model.device)
        with evaluating([self.model]), head_only_on(self.model, lambda states: states[rows, columns]):
            return self.model(**inputs)["logits"]  # (batch, V)


def written_like(word: str, other: str) -> str:
    """`other`, with a capital where `word` begins with one."""
    return other[0].upper() + other[1:] if word[0].isupper() else other
