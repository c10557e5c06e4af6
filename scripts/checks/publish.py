"""Publish a model with each kind of tokenizer to a Hub of our own, and see that it reads as it did before.

    python scripts/checks/publish.py --texts 1000

Tokenizers of RoBERTa, BART, T5, XLM-R, Llama, GPT-2 and BERT are trained on texts made here, with a chat template
full of what looks like a path (`</s>`, `[/INST]`, `</think>`), saved beside a tiny model of few bits and published.
What comes back by name must have the same bytes in every file of the tokenizer, give the same tokens for each of the
texts, which are made of their own words, special tokens, code, paths, links and many scripts, and the same chat.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import transformers
from huggingface_hub import constants, snapshot_download
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BartTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

import hf_compress as hfc

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from publishing.server import TOKEN, HubServer  # noqa: E402

VOCABULARY = 400
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %}</think>\n\n"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n/no_think{% endif %}"
)
CHAT = [{"role": "user", "content": "2 + 2 </s> /home/a?"}, {"role": "assistant", "content": "4 and/or [/INST]"}]
PIECES = [
    "good", "bad", "film", "the", "was", "not", "read", "write", "reading", "writer", "un", "happy", "ness",
    "Paris", "München", "naïve", "café", "résumé", "東京", "こんにちは", "привет", "שלום", "مرحبا", "🙂",
    "\U0001f469\u200d\U0001f4bb", "1", "23", "456", "7.5", "-8", "1e-4", "$9", "50%", "a_b", "c-d", "e.f",
    "g/h", "i\\j", "(k)", "[l]", "{m}", "<n>", "'o'", "\"p\"", "q?", "r!", "s;", "t:", "u,", "v&w", "x|y", "#z",
    "/home/a/b", "~/c", "C:\\d", "https://e.f/g?h=i#j", "k@l.m", "def", "f(x):", "return", "</div>", "</s>",
    "<s>", "<pad>", "[MASK]", "[SEP]", "<mask>", "<unk>", "<extra_id_0>", "<|endoftext|>", "[/INST]",
    "</think>\t\n", "", "␣", "½", "ﬁ", "Ⅷ", "é", "ZWJ\u200dx",
]  # fmt: skip


def texts(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        pieces = draw.choices(PIECES, k=draw.randrange(1, 12))
        made.append(draw.choice(("", " ")) + draw.choice((" ", "", "  ", "\n")).join(pieces))
    return made


def byte_pairs(special: list[str], *, llama: bool = False) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of pairs of bytes, or of characters with bytes for those that are not known."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=llama, unk_token=special[0] if llama else None))
    alphabet = [] if llama else pre_tokenizers.ByteLevel.alphabet()
    if llama:
        special = [*special, *(f"<0x{i:02X}>" for i in range(256))]
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.ByteFallback()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = VOCABULARY + len(special) + len(alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(500, seed=1), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokenizer.get_vocab(), [tuple(merge) for merge in merges]


def unigrams(special: list[str]) -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts(500, seed=1), trainer)
    return [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]


def word_pieces() -> dict[str, int]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts(500, seed=1), trainer)
    return tokenizer.get_vocab()


def of_pairs(kind: type, special: list[str], **options) -> PreTrainedTokenizerBase:
    vocabulary, merges = byte_pairs(special, llama=kind is LlamaTokenizer)
    return kind(vocab=vocabulary, merges=merges, **options)


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TOKENIZERS = {
    "roberta": lambda: of_pairs(RobertaTokenizer, ROBERTA),
    "bart": lambda: of_pairs(BartTokenizer, ROBERTA),
    "t5": lambda: T5Tokenizer(vocab=unigrams(["<pad>", "</s>", "<unk>"])),
    "xlm-roberta": lambda: XLMRobertaTokenizer(vocab=unigrams(["<s>", "<pad>", "</s>", "<unk>"])),
    "llama": lambda: of_pairs(LlamaTokenizer, ["<unk>", "<s>", "</s>"], additional_special_tokens=["[/INST]"]),
    "gpt2": lambda: of_pairs(GPT2Tokenizer, ["<|endoftext|>"]),
    "bert": lambda: BertTokenizer(vocab=word_pieces()),
}  # fmt: skip


def save(name: str, folder: Path) -> None:
    """A tokenizer beside a tiny model in 8 bits, whose config.json gets an `auto_map` when it is published."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = TEMPLATE
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
                        vocab_size=len(tokenizer), max_position_embeddings=64)  # fmt: skip
    hfc.quantize(BertForSequenceClassification(config).eval(), bits=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def differences(name: str, hub: HubServer, place: Path, number: int) -> list[str]:
    """What of the published model is not as it was, in words."""
    folder = place / name
    save(name, folder)
    report = hfc.compare({name: folder}, sequence_length=8, latency_rounds=2, throughput_rounds=2, command="check")
    hfc.publish(folder, f"me/{name}", report=report, token=TOKEN, endpoint=hub.url)
    back = Path(snapshot_download(f"me/{name}", endpoint=hub.url, token=TOKEN, cache_dir=place / "cache"))
    found = [f"{file.name} has other bytes" for file in sorted(folder.iterdir())
             if file.name != "config.json" and (back / file.name).read_bytes() != file.read_bytes()]  # fmt: skip
    mine, theirs = (
        (folder / "config.json").read_text(encoding="utf-8"),
        (back / "config.json").read_text(encoding="utf-8"),
    )
    if not theirs.startswith(mine.rstrip().removesuffix("}").rstrip()):
        found.append("config.json has more than an auto_map at its end")
    before, after = (AutoTokenizer.from_pretrained(where) for where in (folder, back))
    written = texts(number)
    wrong = sum(a != b for a, b in zip(before(written)["input_ids"], after(written)["input_ids"], strict=True))
    found += [f"{wrong} of {number} texts have other tokens"] * bool(wrong)
    chats = [one.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) for one in (before, after)]
    found += ["the chat is another"] * (chats[0] != chats[1] or "</think>" not in chats[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--only", choices=sorted(TOKENIZERS))
    run = parser.parse_args()
    constants.HF_HUB_DISABLE_XET = True  # our Hub speaks the older protocol
    transformers.logging.disable_progress_bar()
    hub, wrong = HubServer().start(), 0
    with tempfile.TemporaryDirectory() as place:
        for name in [run.only] if run.only else TOKENIZERS:
            found = differences(name, hub, Path(place), run.texts)
            print(f"{name:12} {'; '.join(found) or f'{run.texts} texts, the chat and all files as before'}", flush=True)
            wrong += bool(found)
    hub.stop()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
