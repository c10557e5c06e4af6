"""What is fed to a graph while it is traced and compared, what its README feeds it, and what is said where it fails."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model
from runtime_models import SMALL, tiny_tokenizer, with_spread
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

import hf_compress as hfc
from hf_compress.formats.runtimes.agreement import Session, check_batches, measure_agreement
from hf_compress.formats.runtimes.readme import readme
from scripts.checks.family_models import CONFIGS

traced = pytest.importorskip("hf_compress.formats.runtimes.traced", exc_type=ImportError)


def with_head(kind: type, family: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return with_spread(kind.from_config(AutoConfig.for_model(family, **{**CONFIGS[family], **changes})).eval())


CACHES = {
    "as-it-is": None,
    "without": GenerationConfig(use_cache=False),  # as gradient checkpointing leaves it
    "of-a-fixed-size": GenerationConfig(cache_implementation="static"),
    "of-several-beams": GenerationConfig(num_beams=3),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("family", "window"), [("gpt2", None), ("llama", None), ("gemma3_text", 8)])
def test_the_graph_of_a_decoder_has_a_cache_and_knows_padding(family, window, cache):
    model = tiny_model(family, **({} if window is None else {"sliding_window": window}))
    if CACHES[cache] is not None:
        model.generation_config = CACHES[cache]
    fed = traced.sample_inputs(model, None)
    layers = fed["past_key_values"].layers
    assert {type(layer).__name__ for layer in layers} == {"DynamicLayer"}  # of a window's its size would be an input
    assert fed["input_ids"].shape == (2, 2)
    assert fed["attention_mask"].shape == (2, layers[0].keys.shape[2] + 2) and not fed["attention_mask"].all()


def test_decoders_are_compared_with_padding_at_the_left():
    mask, positions = (check_batches(tiny_model("llama"), None)[1][name] for name in ("attention_mask", "position_ids"))
    assert not mask[0, :6].any() and mask[0, 6:].all() and mask[1].all()
    assert positions[0, 6:].tolist() == list(range(14)) and positions[1].tolist() == list(range(20))


def test_texts_are_no_longer_than_the_model_reads():
    model = tiny_model("roberta", max_position_embeddings=14)  # its positions begin behind the padding's number
    assert [batch["input_ids"].shape[1] for batch in check_batches(model, None)] == [13, 13]
    assert traced.sample_inputs(model, None)["input_ids"].shape == (2, 13)


def test_a_question_is_traced_and_compared_with_several_choices():
    """One alone would be taken for a constant: the graph would read no other number of them."""
    model = with_head(AutoModelForMultipleChoice, "bert", **SMALL)
    assert traced.sample_inputs(model, None)["input_ids"].shape == (2, 2, 16)
    assert check_batches(model, None)[0]["input_ids"].shape == (16, 2, 32)


def test_classifiers_that_decode_are_given_a_text_with_an_end_alone():
    model = with_head(AutoModelForSequenceClassification, "bart")
    for batch in (traced.sample_inputs(model, []), *check_batches(model, None)):
        assert batch.keys() == {"input_ids", "attention_mask"}
        assert (batch["input_ids"][:, -1] == model.config.eos_token_id).all()
        model(**batch)


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2", "llama"])
def test_no_product_over_nothing_is_traced(family):
    """Of a layer without heads or neurons: OpenVINO gives whatever its memory holds."""
    model = tiny_model(family, **({"num_key_value_heads": 4} if family == "llama" else {}))
    hfc.prune_neurons(hfc.prune_heads(model, {0: range(4)}), {1: range(48)})
    plain, empty = traced.traced(model).model, []
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features == 0:
            empty.append(name)
            torch.nn.init.normal_(module.bias) if module.bias is not None else None
            assert type(module).forward is not torch.nn.Linear.forward
            x = torch.zeros(2, 3, 0)
            expected = torch.nn.functional.linear(x, module.weight, module.bias)
            assert torch.equal(module(x), expected) and module(x).shape == (2, 3, 32)
    assert len(empty) == 2 and type(model.get_submodule(empty[0])) is torch.nn.Linear


class Runtime:
    """In the place of ONNX Runtime: runs the model itself, and remembers what it was fed."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        self.model, self.names, self.fed = model, names, []
        self.SessionOptions = lambda: SimpleNamespace(add_session_config_entry=lambda *entry: None)

    def InferenceSession(self, *args, **options):
        return self

    def get_inputs(self):
        return [SimpleNamespace(name=name) for name in self.names]

    def get_outputs(self):
        return [SimpleNamespace(name="logits")]

    @torch.no_grad()
    def run(self, outputs, fed):
        self.fed.append(dict(fed))
        assert fed.keys() == set(self.names)
        return [self.model(**{name: torch.from_numpy(value) for name, value in fed.items()}).logits.numpy()]


def readme_fed(model: PreTrainedModel, names: list[str], tokenizer, monkeypatch, folder) -> tuple[list[dict], dict]:
    """What the README's lines feed to a graph of inputs `names`, and their variables."""
    runtime = Runtime(model, names)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", runtime)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"id2label": {"0": "bad", "1": "good"}}', encoding="utf-8")
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme(model, "onnx", tokenizer), re.S)[1], scope)
    return runtime.fed, scope


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), None], ids=["tokenizer", "none"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_readme_of_an_encoder_decoder_writes(family, tokenizer, tmp_path, monkeypatch):
    model = with_spread(tiny_model(family))
    names = ["input_ids", "attention_mask", "decoder_input_ids"]
    fed, scope = readme_fed(model, names, tokenizer, monkeypatch, tmp_path)
    written, batch = scope["inputs"]["decoder_input_ids"], {k: torch.from_numpy(v) for k, v in fed[0].items()}
    assert (
        written.shape == (len(batch["input_ids"]), 21) and (written[:, 0] == model.config.decoder_start_token_id).all()
    )
    with torch.no_grad():
        for _ in range(20):
            new = model(**batch).logits[:, -1:].argmax(-1)
            batch["decoder_input_ids"] = torch.cat([batch["decoder_input_ids"], new], 1)
    assert batch["decoder_input_ids"].tolist() == written.tolist()


def test_the_readme_of_several_choices_asks_one_question(tmp_path, monkeypatch, capsys):
    model = with_head(AutoModelForMultipleChoice, "bert", **SMALL)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    fed, _ = readme_fed(model, names, tiny_tokenizer(), monkeypatch, tmp_path)
    assert fed[0]["input_ids"].shape[:2] == (1, 2)
    assert capsys.readouterr().out.strip() in ("[0]", "[1]")


def test_the_readme_of_a_decoder_goes_on_from_its_prompt_without_padding(tmp_path, monkeypatch):
    fed, _ = readme_fed(tiny_model("llama"), ["input_ids"], tiny_tokenizer(), monkeypatch, tmp_path)
    assert fed[0]["input_ids"].tolist() == [tiny_tokenizer()("A fine film.")["input_ids"]]


def refused(model: PreTrainedModel, folder, message: str, error: type = ValueError) -> None:
    with pytest.raises(error, match=message):
        hfc.export(model, folder / "model", format="onnx", tokenizer=tiny_tokenizer())
    assert not list(folder.iterdir())


def test_what_does_not_run_is_refused_before_it_is_traced(tmp_path, monkeypatch):
    onnx = pytest.importorskip("hf_compress.formats.onnx", exc_type=ImportError)
    monkeypatch.setattr(onnx, "graph", lambda *args: 1 / 0)
    refused(tiny_model("vit"), tmp_path, "Models of texts leave for runtimes; ViT.* takes pixel_values")
    refused(
        tiny_model("bert", **SMALL, vocab_size=40), tmp_path, "has a token 63, the model 40 rows: they are not a pair"
    )
    unpadded = with_head(AutoModelForSequenceClassification, "gpt2", pad_token_id=None)
    refused(unpadded, tmp_path, "GPT2ForSequenceClassification fails on .*no padding token is defined")


def test_what_the_exporter_cannot_trace_is_said_with_its_reason(tmp_path, monkeypatch):
    onnx = pytest.importorskip("hf_compress.formats.onnx", exc_type=ImportError)

    def fails(*args):
        raise NotImplementedError("\n aten::odd is unknown\nmore")

    monkeypatch.setattr(onnx.OnnxExporter, "export", fails)
    message = "no onnx graph of BertForSequenceClassification: NotImplementedError: aten::odd is unknown Nothing was"
    refused(tiny_model("bert", **SMALL), tmp_path, message)


def test_a_graph_that_does_not_run_or_gives_nothing_to_compare_is_no_agreement():
    model = tiny_model("bert", **SMALL)
    batch = tiny_batch(model)
    ports = {"input_ids": (None, None)}
    with pytest.raises(RuntimeError, match=r"does not run on .*'input_ids': \(3, 10\).*KeyError: 'size'"):
        measure_agreement(model, Session(ports, lambda fed: fed["size"]), [batch])
    with pytest.raises(RuntimeError, match="have no output of one name"):
        measure_agreement(model, Session(ports, lambda fed: {"other": np.zeros((3, 2))}), [batch])
