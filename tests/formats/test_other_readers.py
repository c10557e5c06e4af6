"""Checkpoints made here open in other loaders, with the logits of our model dequantized. Each where it is installed."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import CompressedTensorsConfig, GPTQConfig, PreTrainedTokenizerFast

import hf_compress as hfc
from tests.helpers import tiny_batch, tiny_model

WIDE = dict(hidden_size=64, intermediate_size=64, head_dim=16, num_hidden_layers=2)  # GPTQ packs whole words
WIDTHS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
NAMES = [f"{bits}-bit{'-symmetric' if symmetric else ''}" for bits, symmetric in WIDTHS]


def exported(folder, format, *, rounded, **options):
    """Writes the file; the model's class, a batch, and the logits of its dense twin.

    `rounded`: where the reader dequantizes in the dtype of the scales, the weights are float16 numbers.
    """
    model = hfc.quantize(tiny_model("llama", **WIDE), group_size=32, **options)
    hfc.export(model, folder, format=format)
    batch = tiny_batch(model)
    twin = model.dequantize()
    for module in twin.model.layers.modules() if rounded else ():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.half().float()
    return type(model), batch, twin(**batch).logits


def opens(library):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS, ids=NAMES)
def test_compressed_tensors_opens_our_file(bits, symmetric, tmp_path):
    opens("compressed_tensors")
    # Transformers gives packed zero points their shape only where it dequantizes at once; else the scales are float32
    options = dict(bits=bits, symmetric=symmetric, rounded=not symmetric)
    kind, batch, expected = exported(tmp_path, "compressed-tensors", **options)
    settings = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    torch.testing.assert_close(kind.from_pretrained(tmp_path, **settings)(**batch).logits, expected)


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS, ids=NAMES)
def test_gptqmodel_opens_our_file(bits, symmetric, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # with one core it starts no worker pool
    opens("gptqmodel")
    opens("optimum")
    kind, batch, expected = exported(tmp_path, "gptq", rounded=True, bits=bits, symmetric=symmetric)
    settings = GPTQConfig(bits=bits, backend="torch")  # its other CPU layers are compiled first
    with torch.compiler.set_stance("force_eager"):
        loaded = kind.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
        assert type(loaded.model.layers[0].mlp.down_proj).__name__ == "TorchLinear"
        torch.testing.assert_close(loaded(**batch).logits, expected)


def test_what_gptqmodel_makes_opens_here(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    opens("gptqmodel")
    opens("optimum")
    from gptqmodel import GPTQModel, QuantizeConfig

    model = tiny_model("llama", **WIDE)
    model.save_pretrained(tmp_path / "plain")
    words = models.WordLevel({**{f"w{i}": i for i in range(63)}, "?": 63}, unk_token="?")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2", pad_token="w0").save_pretrained(
        tmp_path / "plain"
    )
    ids = torch.randint(5, 60, (4, 1, 300), generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("force_eager"):
        settings = QuantizeConfig(bits=4, group_size=32, desc_act=True)
        theirs = GPTQModel.load(str(tmp_path / "plain"), settings, device="cpu", dtype=torch.float32)
        theirs.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
        theirs.save(str(tmp_path / "theirs"))
        settings = GPTQConfig(bits=4, backend="torch")
        read = type(model).from_pretrained(tmp_path / "theirs", dtype=torch.float32, quantization_config=settings)
        batch = tiny_batch(model)
        expected = read(**batch).logits
    ours = hfc.load_gptq(tmp_path / "theirs", dtype=torch.float32)
    assert ours.model.layers[0].mlp.down_proj.scheme.desc_act
    torch.testing.assert_close(ours(**batch).logits, expected, rtol=1e-3, atol=1e-3)  # they dequantize in float16
