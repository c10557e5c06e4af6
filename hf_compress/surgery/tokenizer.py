"""A tokenizer with fewer tokens that cuts the texts made of them into the same pieces."""

import copy
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

BYTE_FALLBACK = {f"<0x{byte:02X}>" for byte in range(256)}

# what tokenizers of translation models remember beside their backend
LANGUAGE_TOKENS = {"cur_lang_code", "cur_lang_code_id", "lang_code_to_id", "id_to_lang_code", "fairseq_tokens_to_ids",
                   "fairseq_ids_to_tokens", "prefix_tokens", "suffix_tokens"}  # fmt: skip


def used_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | tuple[str, str]], *, min_count: int = 1
) -> list[int]:
    """The ids that `texts`, or pairs, need at least `min_count` times; `prune_vocabulary` adds what these need."""
    return sorted(token for token, count in token_counts(tokenizer, texts).items() if count >= min_count)


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | tuple[str, str]]) -> Counter[int]:
    """How often `texts`, or pairs, need each token; special ones do not count."""
    single = (text for one in texts for text in ([one] if isinstance(one, str) else one))
    return Counter(token for text in single for token in tokenizer(text, add_special_tokens=False)["input_ids"])


def needed_tokens(tokenizer: PreTrainedTokenizerBase, keep: Iterable[int]) -> list[int]:
    """`keep` with all that it takes to tell these tokens apart from others, ascending.

    Special and added tokens; single characters and bytes, so that every word can still be spelled; and for byte-pair
    encodings the pieces that a kept token is merged from.
    """
    state = _backend(tokenizer)
    vocabulary = _vocabulary(state["model"])
    names = {token: name for name, token in vocabulary.items()}
    added = {entry["id"] for entry in state["added_tokens"]}
    kept = {*keep, *tokenizer.all_special_ids, *added}
    unknown = sorted(kept - names.keys() - added)
    if unknown:
        raise ValueError(f"The tokenizer has no tokens {unknown[:10]}; it has {len(tokenizer)}, counted from 0.")
    prefix = state["model"].get("continuing_subword_prefix") or ""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet()) | BYTE_FALLBACK
    spelling = (name for name in vocabulary if name in alphabet or len(name.removeprefix(prefix)) == 1)
    kept |= {vocabulary[name] for name in spelling}
    origins: dict[str, list[tuple[str, str]]] = {}
    for left, right in _merges(state["model"]):
        origins.setdefault(left + right, []).append((left, right))
    waiting = [names[token] for token in kept if token in names]
    while waiting:
        for part in (part for pair in origins.get(waiting.pop(), ()) for part in pair):
            if vocabulary[part] not in kept:
                kept.add(vocabulary[part])
                waiting.append(part)
    return sorted(kept)


def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, keep: list[int]) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` with the tokens `keep` (complete, as `needed_tokens` gives them), numbered anew from 0."""
    new = {old: i for i, old in enumerate(keep)}
    state = _backend(tokenizer)
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in keep if old < len(model["vocab"])]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {name: new[old] for name, old in model["vocab"].items() if old in new}
    if "merges" in model:
        kept = model["vocab"]
        model["merges"] = [[a, b] for a, b in _merges(model) if a in kept and b in kept and a + b in kept]
    for entry in state["added_tokens"]:
        entry["id"] = new[entry["id"]]
    if state.get("padding"):
        state["padding"]["pad_id"] = new[state["padding"]["pad_id"]]
    _renumber(state.get("post_processor"), new)
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(state))
    smaller.init_kwargs.pop("added_tokens_decoder", None)  # says the old numbers; the backend knows the new ones
    for name in LANGUAGE_TOKENS & vars(smaller).keys():
        setattr(smaller, name, _with_new_numbers(getattr(smaller, name), new))
    return smaller


def _with_new_numbers(value: Any, new: dict[int, int]) -> Any:
    """Ids as they stand in an attribute: one, a list, by name, or with their names."""
    if isinstance(value, dict):
        return {new.get(a, a): new.get(b, b) for a, b in value.items() if {a, b} & new.keys()}
    return [new[token] for token in value] if isinstance(value, list) else new.get(value)


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} does not run on the tokenizers library, so its vocabulary cannot be read. "
            "Load the fast one with AutoTokenizer."
        )
    state = json.loads(backend.to_str())
    if state["model"]["type"] not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise ValueError(f"A tokenizer of the kind {state['model']['type']} cannot be cut.")
    return state


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {name: i for i, (name, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    return [(left, right) for left, right in pairs]


def _renumber(processor: Any, new: dict[int, int]) -> None:
    """Changes the post-processor's description: wherever it names special tokens, by their new numbers."""
    if isinstance(processor, list):
        for part in processor:
            _renumber(part, new)
    elif isinstance(processor, dict):
        if processor.get("type") == "TemplateProcessing":
            for entry in processor["special_tokens"].values():
                entry["ids"] = [new[old] for old in entry["ids"]]
        elif processor.get("type") in ("BertProcessing", "RobertaProcessing"):
            for name in ("sep", "cls"):
                token, old = processor[name]
                processor[name] = [token, new[old]]
        else:
            _renumber(processor.get("processors"), new)
