"""The same text gives the same batches, in whatever form it comes."""

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

import hf_compress as hfc
from hf_compress.model.calibration import capture_stack_inputs, token_rows
from hf_compress.model.calibration_data import calibration_batches
from tests.helpers import FAMILIES

LENGTHS = (9, 4, 7, 7, 3)
IDS = [[5 + (7 * row + 3 * place) % 50 for place in range(length)] for row, length in enumerate(LENGTHS)]
ROWS = [{"input_ids": ids} for ids in IDS]


def tokenizer(**options):
    """Words w00 to w59 are the tokens 0 to 59; 0 is the padding."""
    fast = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(64)}, unk_token="w63"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="w00", eos_token="w02", unk_token="w63", model_max_length=64, **options
    )


def texts():
    return [" ".join(f"w{i:02}" for i in ids) for ids in IDS]


def loader(batch_size, *, side="right", labels=None, collator=DataCollatorWithPadding):
    rows = [dict(row, **({} if labels is None else {"labels": labels(row)})) for row in ROWS]
    return DataLoader(rows, batch_size, collate_fn=collator(tokenizer(padding_side=side)))


def label(row):
    return len(row["input_ids"]) % 2


def language_loader(batch_size, *, side="right"):
    collator = DataCollatorForLanguageModeling(tokenizer(padding_side=side), mlm=False)
    return DataLoader(ROWS, batch_size, collate_fn=collator)


FORMS = {
    "lists": lambda: IDS,
    "arrays": lambda: [{"input_ids": np.array(ids)} for ids in IDS],
    "plain arrays": lambda: [np.array(ids) for ids in IDS],
    "tensors": lambda: [torch.tensor(ids) for ids in IDS],
    "rows with labels": lambda: [{**row, "labels": label(row)} for row in ROWS],
    "rows of tensors with labels": lambda: [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(1), "idx": torch.tensor(3)} for ids in IDS
    ],
    "rows with other columns": lambda: [{**row, "text": "no", "special_tokens_mask": [0, 0]} for row in ROWS],
    "texts": texts,
    "rows of text": lambda: [{"text": text} for text in texts()],
    "what a tokenizer returns": lambda: tokenizer()(texts()),
    "the same as tensors": lambda: tokenizer()(texts(), padding=True, return_tensors="pt"),
    "the same as arrays": lambda: tokenizer()(texts(), padding=True, return_tensors="np"),
    "padded on the left": lambda: tokenizer(padding_side="left")(texts(), padding=True, return_tensors="pt"),
    "padded without a mask": lambda: [
        {"input_ids": tokenizer()(texts(), padding=True, return_tensors="pt")["input_ids"]}
    ],
    "a loader": lambda: loader(2),
    "a loader with classes": lambda: loader(3, labels=label),
    "a loader padding left": lambda: loader(5, side="left", labels=label),
    "a loader with a label for each token": lambda: language_loader(2),
    "the same padding left": lambda: language_loader(4, side="left"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_form_gives_the_batches_of_its_rows(family, form):
    model = tiny_model(family)
    expected = calibration_batches(ROWS, model, batch_size=2)
    assert [batch["input_ids"].shape for batch in expected] == [(2, 9), (2, 7), (1, 3)]
    assert expected[0]["input_ids"][1].tolist() == [*IDS[1], 0, 0, 0, 0, 0]
    assert expected[0]["attention_mask"].sum(1).tolist() == [9, 4]
    assert "attention_mask" not in expected[1]  # nothing is padded
    found = calibration_batches(FORMS[form](), model, batch_size=2, tokenizer=tokenizer())
    for batch, wanted in zip(found, expected, strict=True):
        assert batch.keys() == wanted.keys()
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_where_text_ends_in_the_padding_token_one_of_them_is_text():
    model = tiny_model("gpt2", pad_token_id=2, eos_token_id=2)
    (batch,) = calibration_batches([{"input_ids": torch.tensor([[5, 6, 2, 2, 2], [5, 6, 7, 8, 2]])}], model)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_a_decoder_reads_its_labels_moved_by_one():
    model = tiny_model("bart")
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9, 2]}, {"input_ids": [5, 6], "labels": [9, 10, 11, 2]}]
    (batch,) = calibration_batches(rows, model)
    assert batch["decoder_input_ids"].tolist() == [[2, 8, 9, 0], [2, 9, 10, 11]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    for side in ("right", "left"):
        collator = DataCollatorForSeq2Seq(tokenizer(padding_side="right"), model if side == "right" else None)
        (other,) = calibration_batches(DataLoader(rows, 2, collate_fn=collator), model)
        assert other.keys() == batch.keys() and all(torch.equal(other[name], batch[name]) for name in batch)
    with pytest.raises(ValueError, match=r"decoder of BartForConditionalGeneration.*`labels` or `decoder_input_ids`"):
        calibration_batches([{"input_ids": [5, 6, 7]}], model)


def test_pictures_come_as_rows_and_as_batches_with_labels():
    model = tiny_model("vit")
    pixels = tiny_batch(model)["pixel_values"]
    rows = [{"pixel_values": image.tolist(), "labels": 0} for image in pixels]
    for form in (rows, [{"pixel_values": pixels, "labels": torch.tensor([0, 1, 0])}], {"pixel_values": pixels.numpy()}):
        (batch,) = calibration_batches(form, model)
        assert batch.keys() == {"pixel_values"} and torch.equal(batch["pixel_values"], pixels)


def test_choices_of_one_example_stay_together():
    config = AutoConfig.for_model("bert", **FAMILIES["bert"])
    model = AutoModelForMultipleChoice.from_config(config).eval()
    ids = torch.tensor([[[5, 6, 7, 0], [8, 9, 0, 0]], [[5, 0, 0, 0], [7, 8, 0, 0]]])
    whole = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}
    (batch,) = calibration_batches([whole], model)
    assert torch.equal(batch["input_ids"], ids[..., :3]) and torch.equal(
        batch["attention_mask"], (ids != 0)[..., :3].long()
    )
    inputs = capture_stack_inputs(model, hfc.anatomy(model).stacks[0], [batch])
    assert inputs.masks[0].tolist() == (ids != 0)[..., :3].flatten(0, 1).tolist()


@pytest.mark.parametrize(
    "shape", [(2, 3, 4), (3, 2, 4), (6, 4)], ids=["batch first", "tokens first", "batch and tokens in one"]
)
def test_rows_of_real_tokens_in_any_layout(shape):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(24.0).view(2, 3, 4)
    given = {(2, 3, 4): x, (3, 2, 4): x.transpose(0, 1), (6, 4): x.flatten(0, 1)}[shape]
    assert torch.equal(token_rows(given, mask), torch.stack([x[0, 0], x[0, 1], x[1, 0]]))


def test_rows_that_are_no_tokens_come_whole():
    mask = torch.tensor([[True, False], [True, True]])
    positions = torch.randn(1, 4, 3)  # as many numbers as tokens, but of no token
    assert torch.equal(token_rows(positions, mask), positions[0])


@pytest.mark.parametrize("family", ["gpt2", "deberta-v2"])
def test_rows_and_padded_batches_with_labels_make_the_same_model(family):
    rows = [{"input_ids": ids, "labels": 1} for ids in IDS * 8]
    padded = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}
        for ids, mask in (
            (torch.nn.functional.pad(torch.tensor(row["input_ids"])[None], (12 - len(row["input_ids"]), 0)),
             torch.nn.functional.pad(torch.ones(1, len(row["input_ids"]), dtype=torch.long),
                                     (12 - len(row["input_ids"]), 0)))
            for row in rows
        )
    ]  # fmt: skip
    one, two = (hfc.quantize(tiny_model(family), 4, method="gptq", calibration=form) for form in (rows, padded))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
