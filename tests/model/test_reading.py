"""Padding is what the attention mask says, a tokenizer without words is none, positions are counted as models do."""

import pytest
import torch
from helpers import tiny_model
from recipe_run import tiny_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from hf_compress.measuring.metrics import metric_for
from hf_compress.measuring.quality import padding_collator
from hf_compress.model.reading import IGNORED, PaddingCollator, num_positions, num_positions_of, open_tokenizer

END = 1


def without_pad_token(**options) -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama's: it has an end of text, and no token to pad with."""
    backend = Tokenizer(models.WordLevel({"word": 0, "<end>": END, "other": 2}, unk_token="word"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **options)


@pytest.mark.parametrize("options", [{}, {"pad_token": "<end>"}, {"padding_side": "left"}],
                         ids=["no pad token", "end as pad token", "left"])  # fmt: skip
def test_a_language_model_learns_where_texts_end(options):
    batch = PaddingCollator(without_pad_token(**options), tokens_are_labels=True)(
        [{"input_ids": [2, 0, END]}, {"input_ids": [END]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[2, 0, END], [END, IGNORED, IGNORED]]
    assert batch["input_ids"][0].tolist() == [2, 0, END] and batch["input_ids"][1, 0] == END


def test_a_language_model_trained_on_padded_batches_ends_its_texts():
    model = tiny_model("gpt2", vocab_size=3, pad_token_id=None, bos_token_id=END, eos_token_id=END).train()
    collate = PaddingCollator(without_pad_token(), tokens_are_labels=True)
    batch = collate([{"input_ids": [2, 0, END]}] * 7 + [{"input_ids": [2, 0, 0, 0]}] * 3)  # 7 of 10 end after two words
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    probability = model.eval()(torch.tensor([[2, 0]])).logits[0, -1].softmax(-1)[END].item()
    assert abs(probability - 0.7) < 0.1  # that of the texts; near 0 where the ends were masked


def test_labels_of_tokens_and_all_columns_are_padded_on_the_tokenizers_side():
    rows = [{"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1], "labels": [1, 2, 3]},
            {"input_ids": [8], "token_type_ids": [0], "labels": [4]}]  # fmt: skip
    right = PaddingCollator(BertTokenizerFast(vocab={"[PAD]": 0}))(rows)
    assert right["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    left = PaddingCollator(without_pad_token(padding_side="left"))(rows)
    assert left["labels"].tolist() == [[1, 2, 3], [IGNORED, IGNORED, 4]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("label", [3, 0.5, [1.0, 0.0]], ids=["class", "score", "several"])
def test_labels_of_texts_are_not_padded(label):
    rows = [{"input_ids": [5, 6], "label": label}, {"input_ids": [8], "label": label}]
    batch = PaddingCollator(without_pad_token())(rows)
    assert batch["labels"].tolist() == [label, label] and "label" not in batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_likelihood_is_of_real_tokens_given_real_tokens(side):
    model = tiny_model("llama")  # relative positions: padding moves nothing
    alone = torch.tensor([[5, 6, 7]])
    expected = model(alone).logits[0, :-1].double().log_softmax(-1).gather(-1, alone[0, 1:, None]).mean()
    padded = {"left": [0, 0, 5, 6, 7], "right": [5, 6, 7, 0, 0]}[side]
    mask = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0]}[side]
    batch = {"input_ids": torch.tensor([padded]), "attention_mask": torch.tensor([mask])}
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    metric = metric_for(model, [])
    found = metric.total(metric.keep(model(**batch, position_ids=positions), batch, []))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # float32 logits of another shape


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "gpt2", "qwen2", "bart", "deberta-v2", "llama"])
def test_a_folder_without_tokenizer_files_is_refused(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer beside the model"):
        open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="the examples differ in length: give the tokenizer"):
        padding_collator([{"input_ids": [1]}, {"input_ids": [1, 2]}], None, tmp_path, "input_ids")


def test_a_tokenizer_whose_words_are_lost_is_refused(tmp_path):
    tiny_folder(tmp_path)
    assert len(open_tokenizer(tmp_path)) == 64
    for file in ("tokenizer.json", "vocab.txt"):
        (tmp_path / file).unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(tmp_path)("good film")["input_ids"] == [2, 1, 1, 3]  # all unknown
    with pytest.raises(ValueError, match="none of the files tokenizer.json, vocab.txt"):
        open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="none of the files"):
        padding_collator([{"input_ids": [1]}], None, tmp_path, "input_ids")


@pytest.mark.parametrize("family, changes, longest", [
    ("bert", {}, 64), ("gpt2", {}, 64), ("llama", {}, 64), ("bart", {}, 64), ("distilbert", {}, 64),
    ("roberta", {}, 63), ("roberta", {"pad_token_id": 1}, 62), ("vit", {}, None),
])  # fmt: skip
def test_the_longest_text_is_one_that_the_model_reads(family, changes, longest):
    model = tiny_model(family, **changes)
    assert num_positions(model) == longest
    assert num_positions_of(model.config) == longest
    if longest is not None:
        base = AutoModel.from_config(model.config).eval()
        base(torch.full((1, longest), 5))
        if family in ("bert", "roberta", "gpt2"):  # tables of positions
            with pytest.raises((IndexError, RuntimeError)):
                base(torch.full((1, longest + 1), 5))
