"""Token ids in configs, found by what fields are called, and numbered anew when tokens go."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

ROLES = ("_token_id", "_token_ids", "_token_index", "_token_indices")  # endings: one token, or several with one role
SINGLE = ("suppress_tokens", "begin_suppress_tokens")  # tokens, each for itself
WORDS = ("bad_words_ids", "force_words_ids")  # sequences of tokens, and choices of such
FORCED = "forced_decoder_ids"  # pairs (position, token)
BIAS = "sequence_bias"  # sequence -> number, as a mapping, or as pairs where it was read from a file

Config = PretrainedConfig | GenerationConfig


def configs_of(config: Config | None) -> Iterator[Config]:
    """A config and those within it, of a text model beside an image model or of an encoder."""
    if config is not None:
        yield config
        for value in vars(config).values():
            if isinstance(value, (PretrainedConfig, GenerationConfig)):
                yield from configs_of(value)


def role_tokens(config: Config) -> set[int]:
    """Tokens that a model cannot do without: its padding, its ends, those it is forced to write."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(ROLES):
            found.update(value if isinstance(value, list) else [value])
        elif name == FORCED:
            found.update(token for _, token in value or ())
    return {token for token in found if isinstance(token, int)}


class NewNumbers:
    """Turns fields with token ids into ones with new ids. `dropped` tells what referred to tokens that are gone.

    Args:
        new: old id -> new id, of the tokens that stay.
        size: how many there were; numbers beyond are no tokens and stay.
    """

    def __init__(self, new: Mapping[int, int], size: int):
        self.new, self.size, self.dropped = new, size, []

    def fields(self, config: Config) -> dict[str, Any]:
        """Name -> new value, of the fields that hold token ids."""
        changed = {}
        for name, value in vars(config).items():
            if value is not None and self._holds_tokens(name):
                before = len(self.dropped)
                changed[name] = self._changed(name, value)
                self.dropped[before:] = [f"{name} {one}" for one in self.dropped[before:]]
        return changed

    @staticmethod
    def _holds_tokens(name: str) -> bool:
        return name.endswith(ROLES) or name in (*SINGLE, *WORDS, FORCED, BIAS)

    def _changed(self, name: str, value: Any) -> Any:
        if name in WORDS:
            return self._sequences(value) or None  # an empty list is refused by `generate`
        if name == FORCED:
            return [[place, *kept] for place, token in value if (kept := self._sequence([token]))] or None
        if name == BIAS:
            entries = value.items() if isinstance(value, Mapping) else value
            kept = [(self._sequence(tokens), bias) for tokens, bias in entries]
            kept = [(tokens, bias) for tokens, bias in kept if tokens]
            return ({tuple(t): b for t, b in kept} if isinstance(value, Mapping) else [[t, b] for t, b in kept]) or None
        if isinstance(value, list):
            return [number for token in value for number in self._sequence([token])]
        kept = self._sequence([value]) if isinstance(value, int) else [value]
        return kept[0] if kept else None

    def _sequences(self, value: list) -> list:
        """Sequences, or lists of them, without those that hold a token that is gone."""
        if all(isinstance(token, int) for token in value):
            return self._sequence(value)
        return [kept for part in value if (kept := self._sequences(part))]

    def _sequence(self, tokens: Any) -> list[int]:
        """One sequence in new numbers; nothing where one of its tokens is gone."""
        gone = [token for token in tokens if 0 <= token < self.size and token not in self.new]
        if gone:
            self.dropped.append(list(tokens))
            return []
        return [self.new.get(token, token) for token in tokens]
