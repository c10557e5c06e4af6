"""A byte-level BPE tokenizer in a GGUF file. llama.cpp knows how to split texts by a name, found by what ours does."""

import json
import logging
import tempfile

import gguf
from gguf import TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.formats.runtimes.folder import check_pair

logger = logging.getLogger(__name__)

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PLAIN_BYTES = {**BYTES, "use_regex": False}
# By structure: the hashes that llama.cpp's converter goes by change with the vocabulary, and pruning cuts it.
PRE_TOKENIZERS = {
    "gpt-2": [BYTES],
    "smollm": [DIGITS, BYTES],
    "llama-bpe": [split(WORDS + r"\p{N}{1,3}" + REST), PLAIN_BYTES],
    "qwen2": [split(WORDS + r"\p{N}" + REST), PLAIN_BYTES],
}


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str:
    """llama.cpp's name for how `tokenizer` splits texts. Raises ValueError where it has none.

    `vocabulary` is the number of rows of the model's embedding, which must have one for each token.
    """
    if not tokenizer.is_fast:
        raise ValueError("GGUF needs a fast tokenizer: its file says how texts are split.")
    check_pair(tokenizer, vocabulary)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pre, normalizer = state["pre_tokenizer"] or {"type": None}, state["normalizer"]
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"} for step in pre.get("pretokenizers", [pre])
    ]
    found = next((name for name, known in PRE_TOKENIZERS.items() if steps == known), None)
    is_nfc = normalizer is not None and normalizer["type"] == "NFC"
    if state["model"]["type"] != "BPE" or found is None or (normalizer and not is_nfc):
        raise ValueError(
            f"llama.cpp has no byte-level BPE that splits as {json.dumps(steps)} does after {normalizer}; known are "
            f"{sorted(PRE_TOKENIZERS)}. Export as 'plain' and use llama.cpp's own converter."
        )
    if is_nfc:
        logger.warning("llama.cpp does not compose characters (NFC), as this tokenizer does: texts should be composed.")
    return found


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    pre_tokenizer(tokenizer, model.config.vocab_size)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Tokens, merges, special tokens and chat template; rows of the embedding without a token get a name."""
    vocabulary = model.config.vocab_size
    pre = pre_tokenizer(tokenizer, vocabulary)
    names, added = {i: token for token, i in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder

    def kind(i: int) -> TokenType:
        if i not in names:
            return TokenType.UNUSED
        return TokenType.NORMAL if i not in added else TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocabulary)])
    writer.add_token_types([kind(i) for i in range(vocabulary)])
    with tempfile.TemporaryDirectory() as folder:  # gguf reads merges, special tokens and chat template from files
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token["bos"] = ids[0] == tokenizer.bos_token_id
    special.add_special_token["eos"] = ids[-1] == tokenizer.eos_token_id
    special.add_to_gguf(writer, quiet=True)
