"""Every ready recipe takes a model of any depth and of the families it is for: nothing in it counts on six layers.

Each pair of recipe, depth and family is run here; each triple in the long suite, with its evaluation.
"""

from itertools import product

import pytest
import torch
from recipe_run import QUICK, TRAIN, reviews, tiny_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_compress.recipe import Recipe, ready_recipes

DEPTHS = (2, 4, 6, 12)
ENCODERS = {"bert": "num_hidden_layers", "distilbert": "n_layers", "mpnet": "num_hidden_layers"}
DECODERS = {  # tables tied to the head and few heads for keys, as SmolLM2 and small Qwens are built
    "llama": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 1},
    "qwen3": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
HALVED = {"classifier-cpu", "classifier-cpu-together", "classifier-tiny", "few-labels"}
CLASSIFIERS = sorted([*HALVED, "sparse-blocks"])
LANGUAGE = ("llm-2bit", "llm-3bit", "llm-3bit-mixed", "llm-4bit")


def pairs(recipes, families):
    """A triple for each pair of its parts: the family goes round with recipe and depth."""
    every = product(enumerate(recipes), enumerate(DEPTHS))
    return [(recipe, depth, families[(i + j) % len(families)]) for (i, recipe), (j, depth) in every]


def smaller(stages, *, evaluates):
    """The stages as written, of a step or a few texts each."""
    trains = {**TRAIN, "logging_steps": 1}
    few = {"fine-tune": {**TRAIN, "max_steps": 1}, "distil": trains, "evaluate": QUICK}
    found = []
    for stage in stages:
        ((kind, options),) = stage.items()
        if kind == "together":
            options = smaller(options, evaluates=False)
        elif kind == "quantize" and "gptq" in options.values():
            options = {**options, "calibration_examples": 8}
            options |= {"sensitivity_examples": 2} if "average_bits" in options else {}
        elif "num_updates" in options:  # of blocks, in four steps
            options = {**options, "num_updates": 2, "end": 0.7}
        else:
            options = {**options, **few.get(kind, {})}
        if kind != "evaluate" or evaluates:
            found.append({kind: options})
    return found


def run(name, folder, data, tmp_path, *, evaluates):
    recipe = Recipe.from_yaml(name)
    options = {**recipe.data, "source": str(data), "max_length": 16}
    recipe = recipe.changed(stages=smaller(recipe.written, evaluates=evaluates), model=str(folder), data=options)
    return recipe.run(tmp_path / "out")


def classifier(name, depth, family, tmp_path, *, evaluates=False):
    folder = tiny_folder(tmp_path / family, family, **{ENCODERS[family]: depth})
    result = run(name, folder, reviews(tmp_path / "r.csv"), tmp_path, evaluates=evaluates)
    model = AutoModelForSequenceClassification.from_pretrained(result.model)
    assert model.config.num_hidden_layers == (depth // 2 if name in HALVED else depth)
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert model(**inputs).logits.isfinite().all()
    losses = next(r["figures"]["last_losses"] for r in result.stages if r["kind"] in ("distil", "together"))
    assert (losses.get("hint_loss", 0.0) > 0) == (name != "few-labels"), "hints found layers to learn from"


def language_model(name, depth, family, tmp_path, *, evaluates=False):
    sizes = dict(num_hidden_layers=depth, hidden_size=64, intermediate_size=96, vocab_size=72)  # Qwen adds a token
    folder = tiny_folder(tmp_path / family, family, **{**sizes, **DECODERS[family]})
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the film was good bad {i % 7}" for i in range(60)), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(run(name, folder, texts, tmp_path, evaluates=evaluates).model)
    bits = model.config.quantization_config["bits"]
    assert len({key.rpartition("layers.")[2].partition(".")[0] for key in bits if "layers." in key}) == depth
    assert any(key.endswith("embed_tokens") for key in bits)
    assert model(input_ids=torch.tensor([[2, 5, 6, 3]])).logits.isfinite().all()


ENCODING = pairs(CLASSIFIERS, list(ENCODERS))
DECODING = pairs(LANGUAGE, ["llama", "qwen2"])


def named(triple):
    return "{}-{}-{}".format(*triple)


def shallow(triples):
    """Twelve layers take as long as all others: with `make test-long`."""
    return [pytest.param(one, marks=[pytest.mark.long] * (one[1] == max(DEPTHS))) for one in triples]


def test_no_recipe_is_left_out():
    assert {*CLASSIFIERS, *LANGUAGE} == set(ready_recipes())
    for triples, recipes, families in ((ENCODING, CLASSIFIERS, ENCODERS), (DECODING, LANGUAGE, ["llama", "qwen2"])):
        for one, two in ((0, 1), (0, 2), (1, 2)):
            names = (recipes, DEPTHS, list(families))
            assert {(t[one], t[two]) for t in triples} == set(product(names[one], names[two]))


@pytest.mark.parametrize("triple", shallow(ENCODING), ids=named)
def test_a_classifier_of_any_depth(triple, tmp_path):
    classifier(*triple, tmp_path)


@pytest.mark.parametrize("triple", shallow(DECODING), ids=named)
def test_a_language_model_of_any_depth(triple, tmp_path):
    language_model(*triple, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("triple", sorted(product(CLASSIFIERS, DEPTHS, ENCODERS)), ids=named)
def test_a_classifier_of_every_kind(triple, tmp_path):
    classifier(*triple, tmp_path, evaluates=True)


@pytest.mark.long
@pytest.mark.parametrize("triple", sorted(product(LANGUAGE, DEPTHS, DECODERS)), ids=named)
def test_a_language_model_of_every_kind(triple, tmp_path):
    language_model(*triple, tmp_path, evaluates=True)
