"""Embedders: the vectors that the README's lines give are those of the packed model, as its folder pools them."""

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_model
from runtime_models import ROWS, SMALL, run_readme, tiny_tokenizer, with_spread
from transformers import AutoModel

import hf_compress as hfc
from hf_compress.formats.runtimes.readme import is_embedder, readme
from hf_compress.model.pooling import MODES, Pooling, read_pooling, write_pooling
from scripts.checks.family_models import CONFIGS

PACKAGES = {"openvino": "openvino", "onnx": "onnxscript"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    with_spread(tiny_model("bert", **SMALL)).bert.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(folder):
    return hfc.quantize(AutoModel.from_pretrained(folder).eval(), embedding_bits=8, **ROWS)


@pytest.fixture(scope="module")
def expected(packed):
    """Last states (B, T, D) and the mask of the README's two texts."""
    texts = ["A fine film.", "Two hours that I shall never get back."]
    texts = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return packed(**texts).last_hidden_state, texts["attention_mask"]


@pytest.mark.parametrize("format", PACKAGES)
def test_vectors_are_those_of_the_packed_model(format, packed, expected, tmp_path, monkeypatch):
    pytest.importorskip(PACKAGES[format])
    hfc.export(packed, tmp_path / "model", format=format, tokenizer=tiny_tokenizer())
    vectors = torch.from_numpy(run_readme(tmp_path / "model", monkeypatch)["vectors"]).float()
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    cosine = torch.cosine_similarity(vectors, Pooling()(*expected), dim=-1)
    least = {"onnx": 0.99999, "openvino": 0.999}  # inputs as they are; rounded in groups where that is faster
    assert (cosine >= least[format]).all()
    assert read_pooling(tmp_path / "model") == Pooling()  # for sentence-transformers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_readme_pools_as_the_folder_does(mode, normalize, folder, packed, expected):
    write_pooling(folder, Pooling(mode, normalize), 32)  # read where the model came from
    lines = readme(packed, "onnx", tiny_tokenizer()).partition("states, mask = ")
    states, mask = expected
    scope = {"np": np, "outputs": {"last_hidden_state": states.numpy()},
             "inputs": {"attention_mask": mask.numpy()}}  # fmt: skip
    exec((lines[1] + lines[2]).partition("print(")[0], scope)
    found, pooled = torch.from_numpy(scope["vectors"]).float(), Pooling(mode, normalize)(states, mask)
    torch.testing.assert_close(found, torch.nn.functional.normalize(pooled) if normalize else pooled)


@pytest.mark.parametrize("name", ["GPT2Model", "T5EncoderModel", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "T5Model"])
def test_what_ends_in_model_and_has_a_head_or_a_decoder_behind_an_encoder_is_no_embedder(name):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**CONFIGS[kind.config_class.model_type]))
    assert is_embedder(model) == (name in ("GPT2Model", "T5EncoderModel"))


def test_an_embedder_with_a_map_behind_its_pooling_is_refused_before_anything_is_written(folder, packed, tmp_path):
    pytest.importorskip("onnxscript")
    write_pooling(folder, Pooling(), 32, dense=torch.eye(32)[:8])
    with pytest.raises(ValueError, match="made by more than a pooling"):
        hfc.export(packed, tmp_path / "model", format="onnx", tokenizer=tiny_tokenizer())
    (folder / "modules.json").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mode", "number"), [("mean", 1), ("cls", 2), ("lasttoken", 3)])
def test_a_gguf_file_pools_as_the_folder_does(mode, number, folder, packed, tmp_path):
    gguf = pytest.importorskip("gguf")
    write_pooling(folder, Pooling(mode), 32)
    hfc.export(AutoModel.from_pretrained(folder), tmp_path / "model", format="gguf", tokenizer=tiny_tokenizer())
    read = gguf.GGUFReader(tmp_path / "model" / "model.gguf")
    assert read.get_field("bert.pooling_type").contents() == number
    write_pooling(folder, Pooling("max"), 32)
    with pytest.raises(ValueError, match="llama.cpp pools .*, not max"):
        hfc.export(AutoModel.from_pretrained(folder), tmp_path / "other", format="gguf", tokenizer=tiny_tokenizer())
    (folder / "modules.json").unlink()
