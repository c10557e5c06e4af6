"""Students of every family have exactly the shape asked for, and no weight that is not the teacher's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import FAMILIES, tiny_batch, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.checkpoint.bits import unpack
from hf_compress.distillation.students import make_student
from hf_compress.model.anatomy import anatomy
from hf_compress.model.weights import float_weights

SEQ2SEQ = dict(d_model=32, vocab_size=64, pad_token_id=0, decoder_start_token_id=0, num_layers=4, num_decoder_layers=4)
WIDE = dict(hidden_size=32, vocab_size=64, max_position_embeddings=66, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(WIDE, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
BART = dict(FAMILIES["bart"], encoder_layers=4, decoder_layers=4)
MORE = {  # beside those of helpers
    "t5": (AutoModelForSeq2SeqLM, dict(SEQ2SEQ, d_kv=8, d_ff=48, num_heads=4)),
    "mt5": (AutoModelForSeq2SeqLM, dict(SEQ2SEQ, d_kv=8, d_ff=48, num_heads=4, num_decoder_layers=3)),
    "gpt_neo": (AutoModelForCausalLM, dict(WIDE, num_layers=4, num_heads=4, intermediate_size=48, window_size=4,
                                           attention_types=[[["global", "local", "local", "global"], 1]])),
    "opt": (AutoModelForCausalLM, dict(WIDE, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48,
                                       word_embed_proj_dim=32)),
    "bloom": (AutoModelForCausalLM, dict(WIDE, n_layer=4, n_head=4)),
    "falcon": (AutoModelForCausalLM, dict(WIDE, num_hidden_layers=4, num_attention_heads=4, ffn_hidden_size=48)),
    "longformer": (AutoModelForSequenceClassification, dict(BERT, attention_window=[4, 8, 4, 8], sep_token_id=2)),
    "roformer": (AutoModelForSequenceClassification, BERT),
    "mistral": (AutoModelForCausalLM, dict(BERT, num_key_value_heads=2)),
    "pegasus": (AutoModelForSeq2SeqLM, BART),
    "bart": (AutoModelForSeq2SeqLM, dict(BART, decoder_layers=3, decoder_attention_heads=2, decoder_ffn_dim=64)),
}  # fmt: skip
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}  # Falcon's rows, group by group
CASES = [*MORE, *(f for f in FAMILIES if f not in MORE)]


def teacher_of(family, **changes):
    """A model whose norms and biases are random as well, so that a weight that was not copied shows."""
    if family in MORE:
        kind, config = MORE[family]
        torch.manual_seed(3)
        model = kind.from_config(AutoConfig.for_model(family, **{**config, **changes})).eval()
    else:
        model = tiny_model(family, seed=3, **changes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def batch_of(model):
    return tiny_batch(model, length=8)


def shape(model):
    stacks = [stack.layers for stack in anatomy(model).stacks]
    return (
        [len(layers) for layers in stacks],
        anatomy(model).hidden_size,
        [{layer.feed_forward.num_neurons for layer in layers} for layers in stacks],
        [{a.num_heads for layer in layers for a in layer.attentions} for layers in stacks],
    )


def settings(layer):
    """What differs between the layers of a stack: how far each one looks."""
    names = ("attention_type", "is_sliding", "sliding_window", "one_sided_attn_window_size")
    modules = layer.module.named_modules()
    return {f"{n}.{s}": v for n, m in modules for s in names if (v := getattr(m, s, None)) is not None}


def assert_all_copied(student, teacher):
    """Every number of the student is one of the teacher's tensor of the same kind of module."""
    known = torch.cat([t.flatten().float() for t in float_weights(teacher).values()]).sort().values
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            found = known[torch.searchsorted(known, parameter.flatten()).clamp(max=len(known) - 1)]
            assert torch.equal(found, parameter.flatten()), name


@pytest.mark.parametrize("family", CASES)
def test_depth_is_the_one_asked_for_and_each_layer_a_copy(family, tmp_path):
    teacher, depth = teacher_of(family), 2
    depths, *widths = shape(teacher)
    student = make_student(teacher, num_hidden_layers=depth, layers="last")
    assert shape(student) == ([depth] * len(depths), *widths)
    assert_all_copied(student, teacher)
    for old, new in zip(anatomy(teacher).stacks, anatomy(student).stacks, strict=True):
        for mine, theirs in zip(new.layers, old.layers[-depth:], strict=True):
            expected = theirs.module.state_dict()
            for name, tensor in mine.module.state_dict().items():
                if name in expected:
                    assert torch.equal(tensor, expected[name]), name
            assert settings(mine) == settings(theirs)
    batch = batch_of(teacher)
    with torch.no_grad():
        logits = student(**batch).logits
        student.save_pretrained(tmp_path)
        assert torch.equal(type(teacher).from_pretrained(tmp_path)(**batch).logits, logits)


@pytest.mark.parametrize("family", CASES)
def test_width_is_the_one_asked_for_and_every_weight_the_teachers(family, tmp_path):
    teacher = teacher_of(family)
    depths, _, _, heads = shape(teacher)
    neurons = {} if family == "bloom" else {"intermediate_size": 24}
    student = make_student(teacher, num_hidden_layers=2, hidden_size=16, **neurons)
    assert shape(student) == ([2] * len(depths), 16, [{neurons.get("intermediate_size", 64)}] * len(depths), heads)
    assert_all_copied(student, teacher)
    batch = batch_of(teacher)
    with torch.no_grad():
        logits = student(**batch).logits
        student.save_pretrained(tmp_path)
        assert torch.equal(type(teacher).from_pretrained(tmp_path)(**batch).logits, logits)


@pytest.mark.parametrize("family", [c for c in CASES if c not in ("longformer", "bloom")])
def test_a_student_without_the_silent_neurons_is_the_teacher(family):
    teacher = teacher_of(family).double()
    for layer in anatomy(teacher).layers:
        columns = float_weights(layer.feed_forward.output)["weight"]
        columns[:, ::2] = 0
    widths = {layer.feed_forward.num_neurons for layer in anatomy(teacher).layers}
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(teacher).items()}
    if len(widths) > 1:
        pytest.skip("one width for all would lose neurons that speak")
    student = make_student(teacher, intermediate_size=min(widths) // 2)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=0, atol=1e-10)


FUSED = {"bloom": {}, "falcon": {}, "falcon-grouped": GROUPED,
         "falcon-each": {"multi_query": False, "num_kv_heads": 4, "new_decoder_architecture": False}}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_a_fused_projection_are_those_of_the_kept_dimensions(name):
    """All queries and keys of half the width of each head are zero, and so are its values: the narrower student,
    made of the other half, computes the same context in every head."""
    teacher = teacher_of(name.partition("-")[0], **FUSED[name])
    half = torch.tensor([0, 1, 4, 5])
    layer = anatomy(teacher).layers[0]
    columns = layer.attention.output.weight.data.unflatten(1, (-1, 8))
    columns[..., [2, 3, 6, 7]] *= 1e-3  # the dimensions that go
    student = make_student(teacher, hidden_size=16)
    mine, theirs = anatomy(student).layers[0].attention, layer.attention
    hidden = _kept_hidden(student, teacher)
    expected = theirs.query.weight.unflatten(0, (-1, 8))[:, half].flatten(0, 1)[:, hidden]
    assert torch.equal(mine.query.weight, expected)


def _kept_hidden(student, teacher):
    mine, theirs = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    return torch.cat([(column == theirs.T).all(dim=1).nonzero().flatten() for column in mine.T])


@pytest.mark.parametrize("kept", [[1, 3], [0, 2]])
def test_fewer_heads_of_t5_come_with_their_position_bias(kept):
    """Two heads say nothing in any layer: without them, and with the bias of the two others, T5 says the same."""
    teacher = teacher_of("t5").double()
    for attention in anatomy(teacher).attentions:
        for head in {0, 1, 2, 3} - set(kept):
            attention.output.weight.data[:, head * 8 : head * 8 + 8] = 0
    student = make_student(teacher, num_attention_heads=2)
    assert {(a.num_heads, a.head_dim) for a in anatomy(student).attentions} == {(2, 8)}
    batch = batch_of(teacher)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=0, atol=1e-10)


def test_the_position_bias_of_t5_comes_along_when_the_first_layer_does_not():
    teacher = teacher_of("t5")
    student = make_student(teacher, layers=[2, 3])
    for mine, theirs in ((student.encoder, teacher.encoder), (student.decoder, teacher.decoder)):
        name = "layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(mine.block[0].get_parameter(name), theirs.block[0].get_parameter(name))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_student_of_a_packed_teacher_has_its_dequantized_weights(family, bits):
    teacher = teacher_of(family)
    hfc.quantize(teacher, bits=bits, group_size=-1, embedding_bits=8)
    plain = copy.deepcopy(teacher)
    unpack(plain)
    student, batch = make_student(teacher), batch_of(teacher)
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, plain(**batch).logits)
    assert_all_copied(make_student(teacher, num_hidden_layers=2, hidden_size=16), teacher)


def test_the_student_of_a_factorised_or_block_sparse_teacher_has_its_dense_weights():
    teacher = teacher_of("bert")
    hfc.factorise_embeddings(teacher, 8)
    for layer in anatomy(teacher).layers:
        layer.feed_forward.output.weight.data[:16] = 0
    hfc.to_block_sparse(teacher, 16)
    student, batch = make_student(teacher), batch_of(teacher)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits)


class Foreign(nn.Linear):
    """A linear map of another library: whole numbers in the place of a weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias


def foreign_teacher(can_dequantize=True):
    teacher = teacher_of("bert")
    for name, module in list(teacher.bert.encoder.named_modules()):
        if isinstance(module, nn.Linear):
            teacher.bert.encoder.set_submodule(name, Foreign(module))

    def dequantize(model, dtype=None):
        if not can_dequantize:
            raise NotImplementedError
        for name, module in list(model.named_modules()):
            if isinstance(module, Foreign):
                plain = nn.Linear(module.in_features, module.out_features)
                plain.weight.data, plain.bias = module.weight * module.scale, module.bias
                model.set_submodule(name, plain)
        return model

    teacher.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method="another"), dequantize=dequantize
    )
    return teacher


def test_the_student_of_a_teacher_that_another_library_packed_has_its_dequantized_weights():
    teacher = foreign_teacher()
    student = make_student(teacher, num_hidden_layers=2)
    theirs = teacher.bert.encoder.layer[3].attention.self.query
    assert torch.equal(student.bert.encoder.layer[1].attention.self.query.weight, theirs.weight * theirs.scale)
    assert isinstance(theirs, Foreign)
    with pytest.raises(ValueError, match="packed by another, which cannot dequantize them"):
        make_student(foreign_teacher(can_dequantize=False))


def test_what_cannot_be_copied_is_named(caplog):
    teacher = teacher_of("bert")
    hfc.prune_neurons(teacher, {1: range(10)})
    hfc.prune_heads(teacher, {2: [0]})
    with pytest.raises(ValueError, match=r"to copy into .*layer.1.intermediate.dense.weight"):
        make_student(teacher)
    make_student(teacher, layers=[0, 3])  # these two are whole
    assert "drawn anew" not in caplog.text
    make_student(teacher, weights="fresh")
    assert "layer.1.intermediate.dense.weight" in caplog.text and "drawn anew" in caplog.text
    narrow = make_student(teacher, layers=[0, 1, 3], intermediate_size=38)  # as many as each of them has
    assert_all_copied(narrow, teacher)
    with pytest.raises(ValueError, match="to copy into .*heads, and none larger"):
        make_student(teacher_of("bert"), hidden_size=16, num_attention_heads=1)


def test_a_part_that_the_teacher_was_made_without_is_drawn_anew_and_named(caplog):
    student = make_student(tiny_model("bert", "mlm").bert, num_hidden_layers=2)
    assert student.pooler is not None and "but for pooler.dense.weight, pooler.dense.bias, which" in caplog.text


def test_widths_that_a_family_cannot_have_are_refused():
    with pytest.raises(ValueError, match="Bloom.* cannot be given intermediate_size=24: its config builds 128"):
        make_student(teacher_of("bloom"), intermediate_size=24)
    electra = tiny_model("electra", embedding_size=16)
    with pytest.raises(ValueError, match=r"has no electra.embeddings_project.bias, .*Choose another hidden_size"):
        make_student(electra, hidden_size=16)
    with pytest.raises(ValueError, match="teacher's 3, got 4: model.decoder.layers has no more"):
        make_student(teacher_of("bart"), num_hidden_layers=4)


def test_a_teacher_with_adapters_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(teacher_of("bert"), peft.LoraConfig(target_modules=["query"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises((TypeError, ValueError), match="merge_and_unload|to copy into"):
            make_student(model)


def test_generation_settings_are_the_teachers():
    teacher = teacher_of("t5")
    teacher.generation_config.max_new_tokens, teacher.generation_config.num_beams = 7, 3
    student = make_student(teacher, num_hidden_layers=1)
    assert (student.generation_config.max_new_tokens, student.generation_config.num_beams) == (7, 3)
    assert student.generation_config is not teacher.generation_config


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_a_student_with_a_deeper_decoder_generates(family, tmp_path):
    """Transformers makes a cache of as many layers as T5's encoder has, where a config does not say otherwise."""
    config = AutoConfig.for_model(family, **{**SEQ2SEQ, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2})
    torch.manual_seed(0)
    student = make_student(AutoModelForSeq2SeqLM.from_config(config).eval(), num_hidden_layers="1/2").eval()
    assert (student.config.num_layers, student.config.num_decoder_layers) == (1, 2)
    ids = torch.randint(5, 60, (2, 6))
    settings = dict(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = student.generate(**settings, use_cache=False)
    student.save_pretrained(tmp_path)
    for model in (student, AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
        assert torch.equal(model.generate(**settings), expected)
