"""Heads in families that fuse their projections group by group, or share a position bias among layers."""

import copy
import pickle

import pytest
import torch
from helpers import tiny_batch, tiny_model
from silence import logits, silenced
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy, matrix
from hf_compress.pruning.methods.heads import head_matrices
from hf_compress.surgery.silent import silent_heads

GROUPED = dict(new_decoder_architecture=True, num_kv_heads=2)
MODELS = {
    "mpnet": ("mpnet", {}),
    "deberta": ("deberta", {}),
    "gpt_neox": ("gpt_neox", {}),
    "phi3": ("phi3", {}),
    "bloom": ("bloom", {}),
    "falcon-one-key": ("falcon", {}),
    "falcon-a-key-each": ("falcon", dict(multi_query=False)),
    "falcon-grouped": ("falcon", GROUPED),
    "falcon-alibi": ("falcon", dict(alibi=True)),
    "falcon-grouped-alibi": ("falcon", dict(GROUPED, alibi=True)),
    "t5": ("t5", {}),
    "mt5": ("mt5", {}),
}
PLANS = {
    "some": {0: [1], 1: [0, 2, 3], 3: [0, 3]},
    "none-left-in-a-layer": {1: [0, 1, 2, 3], 2: [0]},
    "none-left-in-the-first": {0: [0, 1, 2, 3]},
    "as-many-in-each": {i: [i % 2, 2 + i % 2] for i in range(6)},
}


def model_of(name: str, **changes) -> nn.Module:
    family, options = MODELS[name]
    model = tiny_model(family, **options, **changes).double()
    with torch.no_grad():  # biases of heads that differ: a wrong row would be seen
        for key, parameter in model.named_parameters():
            if key.endswith(("relative_attention_bias.weight", "q_bias", "v_bias")):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) % 7 / 3)
    return model


def plan_for(model: nn.Module, plan: str) -> dict[int, list[int]]:
    attentions = anatomy(model).attentions
    heads = {number: gone for number, gone in PLANS[plan].items() if number < len(attentions)}
    if attentions[0].num_key_value_heads == 2:  # whole groups
        heads = {number: gone if len(gone) == 4 else [0, 1] for number, gone in heads.items()}
    return heads


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_without_heads_the_model_computes_what_it_does_where_they_are_silent(name, plan, tmp_path):
    model = model_of(name)
    heads, before = plan_for(model, plan), logits(model)
    with silenced(model, heads=heads):
        expected = logits(model)
    hfc.prune_heads(model, heads)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)  # float64 sums in another order
    assert (before - expected).abs().max() > 1e-9
    model.save_pretrained(tmp_path)
    for other in (type(model).from_pretrained(tmp_path), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mpnet", "deberta")])
def test_generation_with_a_cache_equals_generation_without(name, plan):
    model = model_of(name)
    hfc.prune_heads(model, plan_for(model, plan))
    batch = {k: v for k, v in tiny_batch(model).items() if k in ("input_ids", "attention_mask")}
    if not model.config.is_encoder_decoder:
        batch = {k: v.flip(1) for k, v in batch.items()}  # padding at the left
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))


@pytest.mark.parametrize("name", ["mpnet", "bloom", "t5", "deberta", "falcon-alibi"])
def test_heads_can_go_one_after_the_other(name):
    """What a bias calls a head is counted as in the first model, whatever went before."""
    once, twice = model_of(name), model_of(name)
    hfc.prune_heads(once, {1: [0, 2], 0: [3]})
    hfc.prune_heads(twice, {1: [0]})
    hfc.prune_heads(twice, {1: [1], 0: [3]})
    torch.testing.assert_close(logits(twice), logits(once), rtol=0, atol=1e-14)
    assert once.config.to_dict() == twice.config.to_dict()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_changed_attention_reaches_layers_without_heads(attn):
    """Phi-3 reads its number of heads from the config; the rest of the config stays the model's."""
    model = hfc.prune_heads(tiny_model("phi3"), {1: [0, 1]})
    model.set_attn_implementation(attn)
    assert {a.module.config._attn_implementation for a in anatomy(model).attentions} == {attn}
    hfc.quantize(model, 8)
    model.set_attn_implementation("eager")
    assert all(weights is not None for weights in model(**tiny_batch(model), output_attentions=True).attentions)


def skip_layer(model: nn.Module, number: int) -> None:
    def skip(module, args, kwargs, output):
        return (args[0] if args else kwargs["hidden_states"], *output[1:])

    anatomy(model).layers[number].module.register_forward_hook(skip, with_kwargs=True)


@pytest.mark.parametrize("heads", [{}, {1: [0, 3], 4: [1]}, {0: [0, 1, 2, 3]}], ids=["whole", "some-cut", "first-cut"])
@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_the_first_layer_may_go_though_it_has_the_position_bias(family, heads, tmp_path):
    model, twin = (hfc.prune_heads(model_of(family), heads) for _ in range(2))
    skip_layer(twin, 0)
    skip_layer(twin, 2)
    hfc.prune_layers(model, [1, 3])
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-12)
    assert hasattr(model.config, "quantization_config") == bool(heads), "a whole T5 without its first layer is ordinary"


def test_rows_of_values_where_they_lie_between_others():
    """GPT-NeoX, heads of 2 rows: q0 k0 v0 q1 k1 v1. Falcon with a key for 2 heads: q0 q1 k v, q2 q3 k v."""
    attention = anatomy(tiny_model("gpt_neox", hidden_size=8, num_attention_heads=4)).attentions[0]
    assert attention.value_rows == [4, 5, 10, 11, 16, 17, 22, 23]
    assert attention.blocks([0, 3], [0, 3]) == [0, 1, 2, 9, 10, 11]
    grouped = anatomy(tiny_model("falcon", **GROUPED)).attentions[0]
    assert grouped.value_rows == [*range(24, 32), *range(56, 64)]
    assert grouped.blocks([2, 3], [1]) == [4, 5, 6, 7]


@pytest.mark.parametrize("name", ["gpt_neox", "bloom", "falcon-grouped", "phi3", "t5", "mpnet"])
def test_masked_heads_pass_on_nothing_and_are_found(name):
    model = model_of(name)
    blocks = head_matrices(model)[1]
    mask = torch.ones(blocks.grid)
    mask[0, 1] = 0
    blocks.silence_(mask)
    attention = anatomy(model).attentions[1]
    size = attention.num_heads // attention.num_key_value_heads
    assert silent_heads(attention, is_heard=True) == list(range(size, 2 * size))  # by the values alone
    values = matrix(attention.value)[attention.value_rows]
    is_zero = values.unflatten(0, (-1, attention.head_dim)).abs().sum((1, 2)) == 0
    assert is_zero.nonzero().flatten().tolist() == [1]


def test_values_with_a_bias_of_their_own_are_not_silent():
    """DeBERTa: softmax sums to one, so a head whose values are a bias alone hands that on."""
    model = model_of("deberta")
    attention = anatomy(model).attentions[0]
    with torch.no_grad():
        matrix(attention.value)[attention.value_rows] = 0
        attention.module.v_bias[:8] = 0
    assert silent_heads(attention) == [0]


@pytest.mark.parametrize("name", ["gpt_neox", "t5", "deberta", "falcon-one-key"])
def test_heads_that_a_training_silenced_are_cut(name):
    model = model_of(name)
    gone = range(4) if name == "falcon-one-key" else [2]
    for head in gone:
        matrix(anatomy(model).attentions[1].output).data[:, 8 * head : 8 * head + 8] = 0
    expected = logits(model)
    hfc.prune_heads(model, {1: silent_heads(anatomy(model).attentions[1])})
    assert anatomy(model).attentions[1].num_heads == 4 - len(gone)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


CODEGEN = dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=64, n_positions=64)
MPT = dict(d_model=32, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=64)
LONGT5 = dict(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=64)


@pytest.mark.parametrize("family, kind, options, message", [
    ("codegen", AutoModelForCausalLM, CODEGEN, "order of rows is not known"),  # 'qkv_proj' as Phi-3, in four parts
    ("mpt", AutoModelForCausalLM, MPT, "position bias per head"),
    ("longt5", AutoModelForSeq2SeqLM, LONGT5, "position bias per head"),
])  # fmt: skip
def test_what_looks_alike_but_is_not_known_is_refused(family, kind, options, message):
    with pytest.raises(ValueError, match=message):
        hfc.prune_heads(kind.from_config(AutoConfig.for_model(family, **options)), {0: [0]})


@pytest.mark.parametrize("name", ["mpnet", "t5"])
def test_a_student_of_a_teacher_that_lost_heads_of_a_shared_bias_is_refused(name):
    with pytest.raises(ValueError, match="prune it then"):
        hfc.make_student(hfc.prune_heads(model_of(name), {1: [0]}), num_hidden_layers=1)


@pytest.mark.parametrize("name", ["mpnet", "deberta"])
def test_a_narrower_student_has_the_heads_of_its_bias(name):
    teacher = model_of(name)
    student = hfc.make_student(teacher, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    assert logits(student).isfinite().all()
    for key, mine in student.state_dict().items():
        if key.endswith("relative_attention_bias.weight"):
            theirs = teacher.state_dict()[key]
            assert all(any(torch.equal(column, other) for other in theirs.T) for column in mine.T)
