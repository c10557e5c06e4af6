"""A table of tokens as a product of two factors: the nearest one, tied where the table was, saved and loaded."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import TASKS, tiny_batch, tiny_model
from silence import logits
from transformers import AutoModel, AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.layers.low_rank import LowRankEmbedding, LowRankLinear, factors
from hf_compress.measuring.counting import num_parameters

CASES = [("bert", "classification"), ("bert", "mlm"), ("gpt2", "clm"), ("llama", "clm"), ("gemma3_text", "clm"),
         ("bart", "seq2seq"), ("modernbert", "mlm"), ("distilbert", "tokens")]  # fmt: skip


def test_the_factors_are_the_nearest_of_their_rank():
    weight = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table, projection = factors(weight, 5)
    values = torch.linalg.svdvals(weight)
    error = (table @ projection.T - weight).square().sum()
    torch.testing.assert_close(error, values[5:].square().sum())  # Eckart and Young
    torch.testing.assert_close(projection.T @ projection, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("family, task", CASES, ids=["-".join(case) for case in CASES])
def test_full_rank_changes_nothing_and_lower_ranks_come_back_bit_for_bit(family, task, tmp_path):
    model = tiny_model(family, task).double()
    before = logits(model)
    # Gemma normalises in float32 whatever its dtype, and there a difference in the last bit of float64 can show
    atol = 1e-6 if family == "gemma3_text" else 1e-10
    torch.testing.assert_close(logits(hfc.factorise_embeddings(model, 32)), before, rtol=0, atol=atol)
    model = tiny_model(family, task)
    size = num_parameters(model)
    is_tied = len([p for _, p in model.named_parameters(remove_duplicate=False)]) > len(list(model.parameters()))
    assert hfc.factorise_embeddings(model, 8) is model
    assert size - num_parameters(model) == 64 * 32 - 8 * (64 + 32)
    model.save_pretrained(tmp_path)
    loaded, info = TASKS[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.get_input_embeddings(), LowRankEmbedding)
    head = loaded.get_output_embeddings()
    if head is not None and is_tied:
        assert isinstance(head, LowRankLinear)
        assert head.table is loaded.get_input_embeddings().table
        loaded.tie_weights()
        assert torch.equal(logits(loaded), logits(model))
    assert num_parameters(loaded) == num_parameters(model)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(TASKS[task].from_pretrained(tmp_path / "again")), logits(model))


def test_it_trains_and_a_state_dict_goes_back_in():
    model = hfc.factorise_embeddings(tiny_model("bert", "mlm"), 4).train()
    batch = tiny_batch(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    table = model.get_input_embeddings()
    assert table.table.grad.abs().sum() > 0
    assert table.projection.grad.abs().sum() > 0
    twin = hfc.factorise_embeddings(tiny_model("bert", "mlm", seed=1), 4).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model.eval()))


def test_it_composes_with_surgery(tmp_path):
    model = hfc.prune_heads(hfc.factorise_embeddings(tiny_model("bert"), 8), {0: [1]})
    hfc.prune_layers(model, [0, 2])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(TASKS["classification"].from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_the_table_does_not_have_is_refused(rank):
    model = tiny_model("bert")
    before = logits(model)
    with pytest.raises(ValueError, match="rank must lie between 1 and 32"):
        hfc.factorise_embeddings(model, rank)
    assert torch.equal(logits(model), before)


def test_factorising_twice_is_refused():
    with pytest.raises(ValueError, match="no plain table"):
        hfc.factorise_embeddings(hfc.factorise_embeddings(tiny_model("bert"), 8), 4)


def test_merging_into_the_product_is_refused_not_lost():
    model = hfc.factorise_embeddings(tiny_model("bert"), 8)
    with pytest.raises(RuntimeError, match="read-only"):
        model.get_input_embeddings().weight.data += 1


@pytest.mark.parametrize("family, tables", [("bert", "bert.embeddings"), ("llama", "model.embed_tokens")])
@pytest.mark.parametrize("where", ["disk", "a map", "cpu_offload"])
def test_a_shared_projection_comes_from_wherever_its_owner_keeps_it(family, tables, where, tmp_path):
    """Its owner had put it away again by the time that the other maps ran: they multiplied by what memory held."""
    model = hfc.factorise(tiny_model(family), rank=6, shared=True)
    expected = logits(model)
    model.save_pretrained(tmp_path / "model")
    if where == "cpu_offload":
        offloaded = cpu_offload(type(model).from_pretrained(tmp_path / "model"), torch.device("cpu"))
    else:
        parts = {name: module for name, module in model.named_modules() if not any(module.children())}
        owners = {name for name, module in parts.items() if "projection" in module._parameters}
        away = (set(parts) if where == "disk" else owners) - {tables}
        device_map = {name: "disk" if name in away else "cpu" for name in parts}
        options = {"device_map": device_map, "offload_folder": tmp_path / "away"}
        offloaded = type(model).from_pretrained(tmp_path / "model", **options)
    with torch.no_grad():
        assert torch.equal(offloaded(**tiny_batch(model)).logits, expected)


@pytest.mark.parametrize("ranks, message", [
    ({"embeddings.word_embeddings": 33}, "beyond its shape"),
    ({"embeddings.word_embeddings": 0}, "at least 1"),
    ({"embeddings.word_embeddings": "8"}, "at least 1"),
    ({"embeddings.LayerNorm": 8}, "no low-rank form|of different models"),
    ({"nowhere": 8}, "has no module 'nowhere'"),
], ids=str)  # fmt: skip
def test_bad_ranks_in_a_file_are_refused(ranks, message, tmp_path):
    model = hfc.factorise_embeddings(tiny_model("bert"), 8)
    model.config.quantization_config["structure"]["ranks"] = ranks
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        TASKS["classification"].from_pretrained(tmp_path)


@pytest.mark.parametrize("family, task", [("bert", "mlm"), ("llama", "clm"), ("bart", "seq2seq")])
@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_of_another_task_is_saved_and_opened_without_the_tied_head(family, task, kind, tmp_path):
    """Its record still tells of the head that shared the table's factors."""
    model = tiny_model(family, task, tie_word_embeddings=True)
    hfc.factorise_embeddings(model, 8).save_pretrained(tmp_path / "language")
    other = kind.from_pretrained(tmp_path / "language")
    model.base_model.save_pretrained(tmp_path / "backbone")
    other.save_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, model.config.eos_token_id or 8]])
    for again in (type(other).from_pretrained(tmp_path / "saved"), AutoModel.from_pretrained(tmp_path / "backbone")):
        expected = other if type(again) is type(other) else model.base_model
        with torch.no_grad():
            found, sought = again.eval()(ids)[0], expected.eval()(ids)[0]
            torch.testing.assert_close(found, sought, rtol=0, atol=1e-6)  # products go by the memory's alignment


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_factors_are_not_packed_and_the_rest_is(family):
    """A packed table would look up what it does not hold: refused by name, before anything has changed."""
    model = hfc.factorise_embeddings(tiny_model(family), 8)
    expected = logits(model)
    for verb in (hfc.quantize, hfc.prepare_qat):
        with pytest.raises(ValueError, match="product of two factors .*cannot be packed.*embedding_bits=None"):
            verb(model, 4, embedding_bits=8)
    assert torch.equal(logits(model), expected)
    hfc.quantize(model, 8)
    assert model.get_input_embeddings().rank == 8
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.05)  # 8 bits of weights of 0.02
