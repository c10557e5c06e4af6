"""Texts of kept tokens get the same tokens and the same outputs from a model with a smaller vocabulary."""

import copy
import logging
import re

import pytest
import torch
from helpers import TASKS, default_task, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    MBartTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import hf_compress as hfc
from hf_compress.surgery.token_numbers import NewNumbers
from hf_compress.surgery.tokenizer import needed_tokens, smaller_tokenizer, used_tokens

TEXTS = ["the lower light was slower", "a low tower, a slow flower!", "the tower's lights lower slowly"]
OTHERS = ["widest windows whisper", "newest knives nest", "a zebra quizzed six foxes", "oldest gold holds"] * 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def trained(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of 120 tokens at most, trained on a few lines."""
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL)
    elif kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]")
    backend.train_from_iterator(TEXTS + OTHERS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def model_for(tokenizer: PreTrainedTokenizerBase, family: str, task: str | None = None):
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.sep_token_id,
               bos_token_id=tokenizer.cls_token_id)  # fmt: skip
    if family == "bart":
        ids |= dict(decoder_start_token_id=tokenizer.sep_token_id, forced_eos_token_id=tokenizer.sep_token_id)
    return tiny_model(family, task, vocab_size=len(tokenizer) + 7, **ids)  # rows beyond the tokenizer, as many models


def run(model, tokenizer, texts) -> torch.Tensor:
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_texts_of_kept_tokens_get_the_same_tokens(kind):
    tokenizer = trained(kind)
    used = used_tokens(tokenizer, TEXTS)
    smaller = hfc.prune_vocabulary(model_for(tokenizer, "bert"), tokenizer, keep=used)
    assert len(smaller) < len(tokenizer)
    for text in TEXTS:
        before, after = tokenizer(text)["input_ids"], smaller(text)["input_ids"]
        assert smaller.convert_ids_to_tokens(after) == tokenizer.convert_ids_to_tokens(before)
        assert smaller.decode(after) == tokenizer.decode(before)
    unseen = smaller("knives")["input_ids"]  # spelled, not unknown
    assert smaller.unk_token_id not in unseen
    assert len(unseen) >= len(tokenizer("knives")["input_ids"])


@pytest.mark.parametrize("family, task", [("bert", "classification"), ("bert", "mlm"), ("distilbert", "mlm"),
    ("gpt2", "clm"), ("llama", "clm"), ("gemma3_text", "clm"), ("modernbert", "mlm"), ("deberta-v2", "mlm"),
    ("roberta", "mlm"), ("electra", "tokens"), ("bart", "seq2seq")])  # fmt: skip
def test_outputs_are_the_same_and_the_checkpoint_is_plain(family, task, tmp_path):
    tokenizer = trained("wordpiece")
    model = model_for(tokenizer, family, task)
    expected = run(model, tokenizer, TEXTS)
    keep = used_tokens(tokenizer, TEXTS)
    smaller = hfc.prune_vocabulary(model, tokenizer, keep=keep)
    assert model.config.vocab_size == len(smaller) == model.get_input_embeddings().num_embeddings
    if model.get_output_embeddings() is not None:  # one score for each token that is left
        expected = expected[..., needed_tokens(tokenizer, keep)]
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (family not in ("llama",))
    assert torch.equal(run(model, smaller, TEXTS), expected)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    smaller.save_pretrained(tmp_path)
    loaded, reread = TASKS[task].from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, reread, TEXTS), expected)


def test_special_tokens_are_renumbered_everywhere():
    tokenizer = trained("wordpiece")
    model = model_for(tokenizer, "bart")
    model.generation_config.suppress_tokens = [*tokenizer.convert_tokens_to_ids(["[MASK]", "[PAD]"]), 120]
    last = needed_tokens(tokenizer, [])
    smaller = hfc.prune_vocabulary(model, tokenizer, keep=[])
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == smaller.pad_token_id
        assert config.eos_token_id == config.forced_eos_token_id == smaller.sep_token_id
    assert model.generation_config.suppress_tokens == [last.index(4), last.index(0)]
    assert model.model.shared.padding_idx == smaller.pad_token_id
    assert model.final_logits_bias.shape == (1, len(smaller))
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3).max() < len(smaller)


FORBIDDEN = {
    "bad_words_ids": lambda one, two, gone: [[one], [two, one], [gone], [one, gone]],
    "sequence_bias": lambda one, two, gone: {(one,): -5.0, (two, one): 3.0, (gone, two): 1.0},
    "sequence_bias of a file": lambda one, two, gone: [[[one], -5.0], [[two, one], 3.0], [[gone, two], 1.0]],
    "suppress_tokens": lambda one, two, gone: [one, gone],
    "begin_suppress_tokens": lambda one, two, gone: [gone, two],
    "forced_bos_token_id": lambda one, two, gone: two,
    "forced_eos_token_id": lambda one, two, gone: [one, two],
}


@pytest.mark.parametrize("field", FORBIDDEN)
@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_a_model_writes_the_same_under_the_same_rules(family, field, caplog):
    tokenizer = trained("wordpiece")
    model = model_for(tokenizer, family, default_task(family))
    one, two = tokenizer.convert_tokens_to_ids(["light", "lower"])
    used = used_tokens(tokenizer, TEXTS)
    kept = needed_tokens(tokenizer, used)
    gone = next(token for token in range(len(tokenizer)) if token not in kept)
    name, rules = field.partition(" ")[0], FORBIDDEN[field](one, two, gone)
    setattr(model.generation_config, name, rules)
    batch = tokenizer(TEXTS[:1], return_tensors="pt")
    settings = dict(attention_mask=batch["attention_mask"], max_new_tokens=8, do_sample=False)
    others = [token for token in range(len(tokenizer) + 7) if token not in kept]
    never = [*others, *(model.generation_config.suppress_tokens or [])]
    before = model.generate(batch["input_ids"], **settings, suppress_tokens=never)[0].tolist()

    with caplog.at_level(logging.WARNING):
        smaller = hfc.prune_vocabulary(model, tokenizer, keep=used)
    new = {old: i for i, old in enumerate(kept)}
    rules_now = getattr(model.generation_config, name)
    batch = smaller(TEXTS[:1], return_tensors="pt")
    after = model.generate(batch["input_ids"], **settings)[0].tolist()
    assert after == [new[token] for token in before]
    assert ("Dropped, as their tokens are gone" in caplog.text) == (str(gone) in str(rules))
    numbers = set(re.findall(r"(?<![\d.])\d+(?![\d.])", str(rules_now)))
    assert numbers and numbers <= {str(new[one]), str(new[two])}


def test_words_to_force_are_renumbered_and_what_is_gone_is_dropped():
    numbers = NewNumbers({3: 0, 5: 1, 7: 2}, size=10)
    config = GenerationConfig(force_words_ids=[[3, 5], [[7], [4]], [[4], [3, 4]]], forced_decoder_ids=[[1, 5], [2, 4]],
                              bad_words_ids=[[4]], eos_token_id=[7, 4], pad_token_id=-1)  # fmt: skip
    changed = numbers.fields(config)
    assert changed["force_words_ids"] == [[0, 1], [[2]]]
    assert changed["forced_decoder_ids"] == [[1, 1]]
    assert changed["bad_words_ids"] is None  # `generate` refuses an empty list
    assert changed["eos_token_id"] == [2] and changed["pad_token_id"] == -1
    assert sorted(numbers.dropped) == ["bad_words_ids [4]", "eos_token_id [4]", "force_words_ids [3, 4]",
        "force_words_ids [4]", "force_words_ids [4]", "forced_decoder_ids [4]"]  # fmt: skip


def test_tokens_with_a_role_are_kept_and_configs_within_configs_follow():
    tokenizer = trained("wordpiece")
    model = model_for(tokenizer, "gpt2", "clm")
    last = len(tokenizer) - 1
    model.generation_config.eos_token_id = [tokenizer.sep_token_id, last]
    model.config.reader = BertConfig(eos_token_id=last, pad_token_id=tokenizer.pad_token_id)
    smaller = hfc.prune_vocabulary(model, tokenizer, keep=[])
    (word,) = tokenizer.convert_ids_to_tokens([last])
    assert smaller.convert_ids_to_tokens(model.generation_config.eos_token_id) == ["[SEP]", word]
    assert model.config.reader.eos_token_id == smaller.convert_tokens_to_ids(word)


def test_the_language_of_a_translator_keeps_its_token():
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁good", "▁bad", "▁film", "▁"]
    tokenizer = MBartTokenizer(vocab=[(word, -float(i)) for i, word in enumerate(words)], src_lang="en_XX")
    smaller = smaller_tokenizer(tokenizer, needed_tokens(tokenizer, [4]))
    language = smaller.convert_tokens_to_ids("en_XX")
    assert language < tokenizer.convert_tokens_to_ids("en_XX")
    assert smaller.cur_lang_code == smaller.lang_code_to_id["en_XX"] == language
    assert smaller.suffix_tokens == [smaller.eos_token_id, language] == smaller("good")["input_ids"][1:]


def test_both_texts_of_a_pair_are_read():
    tokenizer = trained("wordpiece")
    pairs = [("the lower light", "a low tower"), ("slow flower", "lights")]
    alone = [text for pair in pairs for text in pair]
    assert used_tokens(tokenizer, pairs) == used_tokens(tokenizer, alone) != used_tokens(tokenizer, alone[::2])


def test_a_pruned_model_keeps_its_structure():
    tokenizer = trained("wordpiece")
    model = hfc.prune_neurons(hfc.prune_heads(model_for(tokenizer, "bert"), {0: [1]}), {2: range(48)})
    expected, structure = run(model, tokenizer, TEXTS), copy.deepcopy(model.config.quantization_config)
    smaller = hfc.prune_vocabulary(model, tokenizer, keep=used_tokens(tokenizer, TEXTS))
    assert torch.equal(run(model, smaller, TEXTS), expected)
    assert model.config.quantization_config == structure


def test_the_tokenizer_given_is_left_alone():
    tokenizer = trained("wordpiece")
    before = tokenizer.backend_tokenizer.to_str()
    hfc.prune_vocabulary(model_for(tokenizer, "bert"), tokenizer, keep=[])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_rare_tokens_can_be_left_out():
    tokenizer = trained("wordpiece")
    assert set(used_tokens(tokenizer, TEXTS, min_count=2)) < set(used_tokens(tokenizer, TEXTS))


def test_tokens_that_do_not_exist_are_refused_and_nothing_changes():
    tokenizer = trained("wordpiece")
    model = model_for(tokenizer, "bert")
    before, config = run(model, tokenizer, TEXTS), model.config.to_dict()
    with pytest.raises(ValueError, match=r"no tokens \[5000\]"):
        hfc.prune_vocabulary(model, tokenizer, keep=[5000])
    assert torch.equal(run(model, tokenizer, TEXTS), before)
    assert model.config.to_dict() == config
    with pytest.raises(ValueError, match="do not belong together"):
        hfc.prune_vocabulary(tiny_model("bert", vocab_size=20), tokenizer, keep=[30])
