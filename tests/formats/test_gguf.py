"""GGUF files hold the weights of the model bit for bit, and readers that are not ours find them where they look."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model
from runtime_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_compress as hfc
from hf_compress.commands.convert import run

gguf = pytest.importorskip("gguf")

from hf_compress.formats.named_weight import named_weights  # noqa: E402
from hf_compress.formats.runtimes.gguf_blocks import Matrix, Type, block_matrix  # noqa: E402
from hf_compress.formats.runtimes.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer  # noqa: E402

LLAMA = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             intermediate_size=96, vocab_size=300)  # fmt: skip
KINDS = {
    "4-bit": (dict(bits=4, group_size=32, symmetric=True), "Q4_0"),
    "4-bit-zeros": (dict(bits=4, group_size=32), "Q5_0"),
    "3-bit-rows": (dict(bits=3, group_size=-1), "Q4_0"),
    "2-bit": (dict(bits=2, group_size=64, skip_modules=(r".*down_proj",)), "Q4_0"),
    "8-bit": (dict(bits=8, group_size=-1, symmetric=True, embedding_bits=8), "Q8_0"),
}


def byte_tokenizer(*, pre=None, size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `size` tokens: special ones, all bytes, and merges of two letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = ["<s>", "</s>", *letters], []
    for first in "abcdefgh":
        for second in "abcdefgh":
            if len(tokens) < size:
                tokens.append(first + second)
                merges.append((first, second))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama(family: str = "llama", **changes):
    return tiny_model(family, **{**LLAMA, **changes})


def read(folder):
    """Decoded tensors and fields of the file."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}, reader


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_weights_and_logits(kind, tmp_path):
    options, expected = KINDS[kind]
    model = hfc.quantize(llama(tie_word_embeddings=kind == "8-bit"), **options)
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=byte_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", gguf_file="model.gguf", dtype=torch.float32)
    for weight in named_weights(model):
        found = loaded.get_submodule(weight.name).weight
        wanted = model.get_submodule(weight.name).dequantize(torch.float32)
        assert torch.equal(found, wanted), weight.name
    contents = json.loads((tmp_path / "model" / "hf_compress.json").read_text(encoding="utf-8"))
    assert contents["architecture"] == "llama" and expected in contents["tensors"]
    batch = tiny_batch(model, padding=False)
    plain = type(model)(model.config)
    plain.load_state_dict(loaded.state_dict(), strict=False)
    # the packed model may multiply in bfloat16 or round its inputs where that is fast
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["F32", "BF16", "F16"])
def test_an_unpacked_model_leaves_in_its_own_dtype(dtype, tmp_path):
    model = llama().to(dtype)
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=byte_tokenizer())
    tensors, _, reader = read(tmp_path / "model")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"F32", {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}
    assert np.array_equal(tensors["token_embd.weight"], model.model.embed_tokens.weight.float().detach().numpy())
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], model.model.layers[1].mlp.down_proj.weight.float().detach())


def test_uneven_layers_say_their_own_numbers(tmp_path):
    model = llama(num_key_value_heads=4)
    hfc.prune_heads(model, {0: [1, 3]})
    hfc.prune_neurons(model, {1: list(range(50))})  # 46 are left: not whole blocks
    hfc.quantize(model, bits=8, group_size=-1, symmetric=True)
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=byte_tokenizer())
    tensors, fields, _ = read(tmp_path / "model")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [2, 4] and fields["deci.attention.head_count_kv"] == [2, 4]
    assert fields["deci.feed_forward_length"] == [96, 64]
    layers = model.model.layers
    down = tensors["blk.1.ffn_down.weight"]
    assert np.array_equal(down[:, :46], layers[1].mlp.down_proj.dequantize().numpy()) and not down[:, 46:].any()
    assert np.array_equal(tensors["blk.1.ffn_up.weight"][:46], layers[1].mlp.up_proj.dequantize().numpy())
    assert not tensors["blk.1.ffn_gate.weight"][46:].any() and not tensors["blk.1.ffn_up.weight"][46:].any()
    query = layers[0].self_attn.q_proj.dequantize().numpy().reshape(2, 2, 8, 64)  # heads, halves, pairs
    assert np.array_equal(tensors["blk.0.attn_q.weight"], query.swapaxes(1, 2).reshape(32, 64))
    assert np.array_equal(tensors["blk.0.attn_v.weight"], layers[0].self_attn.v_proj.dequantize().numpy())


def test_a_layer_without_heads_or_neurons_gets_some_of_zeros(tmp_path):
    model = llama(num_key_value_heads=4)
    hfc.prune_heads(model, {0: [0, 1, 2, 3]})
    hfc.prune_neurons(model, {1: list(range(96))})
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=byte_tokenizer())
    tensors, fields, _ = read(tmp_path / "model")
    assert fields["deci.attention.head_count"] == [1, 4] and fields["deci.feed_forward_length"] == [96, 32]
    for name in ("blk.0.attn_q.weight", "blk.0.attn_output.weight", "blk.1.ffn_down.weight", "blk.1.ffn_up.weight"):
        assert tensors[name].size and not tensors[name].any()


def test_qwen2_whole_keeps_its_rotation_and_cut_takes_llamas(tmp_path):
    for cut, arch in ((False, "qwen2"), (True, "llama")):
        model = llama("qwen2", use_sliding_window=False, num_key_value_heads=4)
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
        if cut:
            hfc.prune_heads(model, {layer: [0, 2] for layer in range(2)})
        hfc.export(model, tmp_path / arch, format="gguf", tokenizer=byte_tokenizer())
        tensors, fields, _ = read(tmp_path / arch)
        assert fields["general.architecture"] == arch
        bias = model.model.layers[0].self_attn.q_proj.bias.detach().numpy()
        turned = bias.reshape(-1, 2, 8).swapaxes(1, 2).ravel()
        assert np.array_equal(tensors["blk.0.attn_q.bias"], turned if cut else bias)


def test_a_tied_head_is_written_once_and_a_cut_vocabulary_fits(tmp_path):
    model, tokenizer = llama(tie_word_embeddings=True), byte_tokenizer(size=290)
    hfc.quantize(model, bits=4, group_size=32, symmetric=True, embedding_bits=8)
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=tokenizer)
    tensors, fields, _ = read(tmp_path / "model")
    assert "output.weight" not in tensors
    assert np.array_equal(tensors["token_embd.weight"], model.model.embed_tokens.dequantize().numpy())
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 300 and tokens[0] == "<s>" and tokens[290] == "[PAD290]"
    assert fields["tokenizer.ggml.token_type"][290] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.merges"][0] == "a a" and fields["tokenizer.ggml.pre"] == "gpt-2"
    with pytest.raises(ValueError, match="they are not a pair"):
        hfc.export(llama(vocab_size=200), tmp_path / "other", format="gguf", tokenizer=tokenizer)
    assert not (tmp_path / "other").exists()


def test_positions_that_are_stretched_are_written_as_factors(tmp_path):
    rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32)  # fmt: skip
    model = llama(rope_parameters=rope)
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=byte_tokenizer())
    tensors, fields, _ = read(tmp_path / "model")
    base = fields["llama.rope.freq_base"] ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(base / tensors["rope_freqs.weight"], model.model.rotary_emb.inv_freq, rtol=1e-6)
    yarn = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=32)
    with pytest.raises(ValueError, match="Positions of the kind 'yarn'"):
        hfc.export(llama(rope_parameters=yarn), tmp_path / "yarn", format="gguf", tokenizer=byte_tokenizer())


def test_block_sparse_layers_leave_with_their_zeros(tmp_path):
    model = llama(intermediate_size=128)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:32, :32] = 0
    expected = model.model.layers[0].mlp.down_proj.weight.detach().numpy().copy()
    hfc.to_block_sparse(model, 32)
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=byte_tokenizer())
    assert np.array_equal(read(tmp_path / "model")[0]["blk.0.ffn_down.weight"], expected)


def test_an_embedder_is_filled_up_with_heads_and_neurons_of_zeros(tmp_path):
    config = dict(hidden_size=64, num_attention_heads=4, intermediate_size=96, num_hidden_layers=2)
    model = tiny_model("bert", **config).bert
    hfc.prune_neurons(hfc.prune_heads(model, {0: [1, 3], 1: [0, 1, 2, 3]}), {1: list(range(50))})
    hfc.quantize(model, bits=8, symmetric=True, group_size=-1, embedding_bits=8)
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=tiny_tokenizer())
    tensors, fields, _ = read(tmp_path / "model")
    assert fields["general.architecture"] == "bert" and fields["bert.attention.head_count"] == 4
    assert fields["bert.feed_forward_length"] == 96 and fields["bert.pooling_type"] == gguf.PoolingType.MEAN
    layers = model.encoder.layer
    query, output = tensors["blk.0.attn_q.weight"], tensors["blk.0.attn_output.weight"]
    assert np.array_equal(query[:32], layers[0].attention.self.query.dequantize().numpy()) and not query[32:].any()
    assert np.array_equal(output[:, :32], layers[0].attention.output.dense.dequantize().numpy())
    assert not output[:, 32:].any() and not tensors["blk.0.attn_v.bias"][32:].any()
    down = tensors["blk.1.ffn_down.weight"]
    assert np.array_equal(down[:, :46], layers[1].output.dense.dequantize().numpy()) and not down[:, 46:].any()
    assert np.array_equal(tensors["blk.1.ffn_up.bias"][:46], layers[1].intermediate.dense.bias.detach().numpy())
    assert np.array_equal(tensors["token_embd.weight"], model.embeddings.word_embeddings.dequantize().numpy())
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:2] == ["[PAD]", "[UNK]"] and tokens[5] == "\u2581good"
    cased = tiny_tokenizer()
    cased.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    with pytest.raises(ValueError, match="in lower case"):
        hfc.export(model, tmp_path / "cased", format="gguf", tokenizer=cased)


@pytest.mark.parametrize("kind", ["packed", "bfloat16", "float16"])
def test_what_llama_cpp_adds_to_the_tokens_is_float32(kind, tmp_path):
    model = tiny_model("bert", hidden_size=64, intermediate_size=64, num_hidden_layers=1).bert
    packed = dict(bits=8, symmetric=True, group_size=-1, embedding_bits=8)
    model = hfc.quantize(model, **packed) if kind == "packed" else model.to(getattr(torch, kind))
    hfc.export(model, tmp_path / "model", format="gguf", tokenizer=tiny_tokenizer())
    tensors, _, reader = read(tmp_path / "model")
    (stored,) = (tensor for tensor in reader.tensors if tensor.name == "token_types.weight")
    table = model.embeddings.token_type_embeddings
    expected = table.dequantize(torch.float32) if kind == "packed" else table.weight.detach().float()
    assert stored.tensor_type.name == "F32" and np.array_equal(tensors[stored.name], expected.numpy())


REFUSED = {
    "8-bit-zeros": (dict(bits=8), "q_proj: GGUF has no 8-bit type with zero points"),
    "groups": (dict(bits=4, group_size=16), "q_proj: GGUF has blocks of 32 columns, which groups of 16"),
    "codebook": (dict(bits=4, grid="kmeans", group_size=-1), "q_proj has a codebook"),
    "inputs": (dict(bits=8, symmetric=True, group_size=-1, activation_bits=8), "q_proj rounds its inputs"),
    "scales": (dict(bits=4, group_size=32, scale_dtype="float32"), "q_proj: its float32 scales do not fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_name(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"self_attn.{message}"):
        hfc.export(hfc.quantize(llama(), **options), tmp_path / "model", format="gguf", tokenizer=byte_tokenizer())
    assert not list(tmp_path.iterdir())


def test_models_and_settings_that_llama_does_not_compute_are_refused(tmp_path):
    def refused(model, message, **options):
        with pytest.raises(ValueError, match=message):
            hfc.export(model, tmp_path / "model", format="gguf", **{"tokenizer": byte_tokenizer(), **options})

    refused(tiny_model("gpt2"), "not GPT2LMHeadModel")
    refused(tiny_model("bert"), "a BertModel, not BertForSequenceClassification")
    refused(llama(hidden_act="gelu"), "SiLU")
    refused(tiny_model("llama", num_hidden_layers=1), "pass `tokenizer`", tokenizer=None)
    refused(llama(), "of a GGUF file the weights are compared", calibration=[{"input_ids": [1]}])
    low_rank = llama()
    hfc.factorise_embeddings(low_rank, 8)
    refused(low_rank, "model.embed_tokens is a product of two factors")
    assert not list(tmp_path.iterdir())


def test_the_pre_tokenizer_is_known_by_what_it_does():
    split, digits, level = pre_tokenizers.Split, pre_tokenizers.Digits, pre_tokenizers.ByteLevel
    assert pre_tokenizer(byte_tokenizer(), 300) == "gpt-2"
    smollm = pre_tokenizers.Sequence([digits(individual_digits=True), level(add_prefix_space=False)])
    assert pre_tokenizer(byte_tokenizer(pre=smollm), 300) == "smollm"
    from tokenizers import Regex

    for name in ("llama-bpe", "qwen2"):
        pattern = Regex(PRE_TOKENIZERS[name][0]["pattern"]["Regex"])
        steps = [split(pattern, "isolated"), level(add_prefix_space=False, use_regex=False)]
        assert pre_tokenizer(byte_tokenizer(pre=pre_tokenizers.Sequence(steps)), 300) == name
    with pytest.raises(ValueError, match="no byte-level BPE that splits as"):
        pre_tokenizer(byte_tokenizer(pre=pre_tokenizers.Whitespace()), 300)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_blocks_decode_to_what_went_in(kind):
    low, high = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}[kind]
    values = np.random.default_rng(0).integers(low, high + 1, (6, 96)).astype(np.int16)
    values[0, :2] = low, high
    matrix = Matrix(Type[kind], values, np.linspace(0.01, 2, 18).reshape(6, 3).astype(np.float16))
    assert np.array_equal(gguf.quants.dequantize(matrix.data(), Type[kind]), matrix.decoded())
    wider = matrix.with_columns(160).with_rows(8)
    assert wider.values.shape == (8, 160) and wider.scales.shape == (8, 5)
    assert np.array_equal(gguf.quants.dequantize(wider.data(), Type[kind])[:6, :96], matrix.decoded())


def test_float32_scales_that_float16_holds_leave():
    model = hfc.quantize(llama(), bits=4, group_size=32, symmetric=True, scale_dtype="float32")
    for module in model.modules():
        if hasattr(module, "scales"):
            module.scales.copy_(module.scales.half())
    assert {block_matrix(weight).kind for weight in named_weights(model)} == {Type.Q4_0}


def test_the_command_line_converts_a_folder_with_its_tokenizer(tmp_path, capsys):
    model = hfc.quantize(llama(), bits=4, group_size=32, symmetric=True)
    model.save_pretrained(tmp_path / "packed")
    byte_tokenizer().save_pretrained(tmp_path / "packed")
    assert run("convert", [str(tmp_path / "packed"), str(tmp_path / "out"), "--format", "gguf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tensors decode to the weights of the model") and lines[1].startswith("gguf")
    # opened from a folder, a model brings its tokenizer
    hfc.export(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), tmp_path / "again", format="gguf")
    first, second = read(tmp_path / "out")[0], read(tmp_path / "again")[0]
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
