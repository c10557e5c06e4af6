"""Scales distilled end to end: integers stay, what learns follows the equations, what is saved is what was seen."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import tiny_batch, tiny_model
from silence import logits
from torch import nn
from torch.func import functional_call
from transformers import AutoModel, AutoModelForCausalLM

import hf_compress as hfc
from distillation.data import rows
from distillation.training import config
from hf_compress.checkpoint.bits import packed_modules
from hf_compress.distillation.scales import ScaleConfig, ScaleTrainer, check_amount
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.trained_scales import ScaledProduct
from hf_compress.model.unfinished import forms_of

KINDS = {  # family -> task, how it is quantized, and a config without dropout
    "llama": ("clm", dict(bits=3, group_size=16, embedding_bits=8), {}),
    "gpt2": ("clm", dict(bits=3, symmetric=True), dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "bert": ("classification", dict(bits=2, group_size=16, embedding_bits=4),
             dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "t5": ("seq2seq", dict(bits=3, group_size=16), dict(dropout_rate=0.0)),
}  # fmt: skip


def sure(model):
    """The random model with larger weights, so that what it predicts is not all alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model


def pair(family="llama", seed=3, **options):
    """A packed student and its float teacher."""
    task, usual, changes = KINDS[family]
    teacher = sure(tiny_model(family, task, seed=seed, **changes))
    return hfc.quantize(copy.deepcopy(teacher), **{**usual, **options}), teacher


def trainer_of(folder, student, teacher, kind="clm", **options):
    args = config(folder, ScaleConfig, **{"learning_rate": 2e-2, **options})
    return ScaleTrainer(
        student, args, teacher_model=teacher, train_dataset=rows(kind=kind), eval_dataset=rows(kind=kind)
    )


def integers(model):
    return {name: module.integers()[0].clone() for name, module in packed_modules(model)}


@pytest.mark.parametrize("is_ordered", [True, False], ids=["neighbours", "act-order"])
def test_gradients_of_a_product_are_those_of_the_dense_weight(is_ordered):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 8, (5, 12), generator=generator, dtype=torch.uint8)
    s, z = (
        torch.rand(5, 3, generator=generator).double() + 0.1,
        torch.randint(0, 8, (5, 3), generator=generator).double(),
    )
    x, upstream = (torch.randn(7, n, generator=generator).double() for n in (12, 5))
    index = torch.arange(12) // 4 if is_ordered else torch.randint(0, 3, (12,), generator=generator)
    leaves = [t.requires_grad_() for t in (x, s, z)]
    y = ScaledProduct.apply(*leaves, q, None if is_ordered else index)
    expected = leaves[0] @ (s[:, index] * (q - z[:, index])).T
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad((y * upstream).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((expected * upstream).sum(), leaves))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_step_follows_the_gradient_of_the_divergence_in_float64(family, tmp_path):
    student, teacher = pair(family)
    batch = {k: torch.tensor(v) for k, v in rows(kind="clm")[:].items()}
    packed = {n: (m.packed_weight(), m.is_conv1d) for n, m in student.named_modules() if isinstance(m, PackedLinear)}
    dense = copy.deepcopy(student).dequantize().double()
    norms = {n: p.detach() for n, p in dense.named_parameters() if p.ndim == 1 and n.endswith("weight")}
    t = {n: torch.zeros(w.scales.shape, dtype=torch.float64, requires_grad=True) for n, (w, _) in packed.items()}
    own = {n: p.clone().requires_grad_() for n, p in norms.items()}
    weights = {}
    for name, (weight, is_conv1d) in packed.items():
        s = (weight.scales.double() * (1 + t[name]))[:, weight.groups]
        matrix = s * (weight.q.double() - weight.zeros.double()[:, weight.groups])
        weights[f"{name}.weight"] = matrix.T if is_conv1d else matrix
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    log_s = functional_call(dense, {**weights, **own}, kwargs=inputs).logits[:, :-1].log_softmax(-1)
    log_t = copy.deepcopy(teacher).double()(**inputs).logits[:, :-1].log_softmax(-1)
    counted = batch["labels"][:, 1:] != -100
    loss = (log_t.exp() * (log_t - log_s)).sum(-1)[counted].mean()
    gradients = dict(zip([*t, *own], torch.autograd.grad(loss, [*t.values(), *own.values()]), strict=True))

    args = config(tmp_path, ScaleConfig, max_steps=1, per_device_train_batch_size=24, optim="sgd", learning_rate=0.1,
                  lr_scheduler_type="constant", warmup_steps=0, finish_at_end=False, scale_dtype="float32")  # fmt: skip
    trainer = ScaleTrainer(student, args, teacher_model=teacher, train_dataset=rows(kind="clm"))
    before = {name: dict(student.named_parameters())[name].detach().clone() for name in norms}
    trainer.train()
    for name in t:  # single precision through two layers, of values near one: a few parts in 10^5
        moved = getattr(trainer.training_state, name.replace(".", "__")).t.detach().double() / -0.1
        torch.testing.assert_close(moved, gradients[name], rtol=1e-3, atol=1e-4 * float(gradients[name].abs().max()))
    for name, old in before.items():  # the rate of a norm is half that of scales, times the mean size of its weights
        moved = (dict(student.named_parameters())[name].detach() - old).double() / (-0.1 / 2 * float(old.abs().mean()))
        torch.testing.assert_close(moved, gradients[name], rtol=5e-2, atol=1e-2 * float(gradients[name].abs().max()))


@pytest.mark.parametrize("family", KINDS)
def test_integers_stay_the_loss_falls_and_what_is_saved_is_what_was_seen(family, tmp_path):
    student, teacher = pair(family)
    before, task = integers(student), KINDS[family][0]
    trainer = trainer_of(tmp_path, student, teacher, task, max_steps=12, finish_at_end=False)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    seen, batch = trainer.evaluate()["eval_loss"], tiny_batch(student)
    trained = logits(student, batch)
    assert seen < first
    student = trainer.finish()
    assert not forms_of(student) and {type(m) for _, m in packed_modules(student)} <= {
        type(m) for _, m in packed_modules(pair(family)[0])
    }
    # the same numbers, multiplied in another order: by the kernels of inference
    torch.testing.assert_close(logits(student, batch), trained, rtol=1e-4, atol=1e-4)
    after = integers(student)
    assert all(torch.equal(after[name], q) for name, q in before.items())
    student.save_pretrained(tmp_path / "saved")
    opened = type(student).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(opened, batch), logits(student.eval(), batch))


CODEBOOKS = {
    "llama": ("clm", dict(bits=3, grid="kmeans", group_size=-1, embedding_bits=8)),
    "bert": ("classification", dict(bits=1, grid="binary", group_size=-1)),
    "gpt2": ("clm", dict(bits=2, grid="ternary", group_size=-1)),
}


@pytest.mark.parametrize("family", CODEBOOKS)
def test_levels_of_codebooks_learn_and_indices_stay(family, tmp_path):
    task, options = CODEBOOKS[family]
    teacher = sure(tiny_model(family, task, seed=3, **KINDS[family][2]))
    student = hfc.quantize(copy.deepcopy(teacher), **options)
    layers = {n: m for n, m in packed_modules(student) if isinstance(m, CodebookLinear)}
    before = {n: (m.qweight.clone(), m.levels.clone()) for n, m in layers.items()}
    trainer = trainer_of(tmp_path, student, teacher, task, max_steps=8, save_strategy="steps", save_steps=8,
                         scale_dtype="float32", learning_rate=2e-3, finish_at_end=False)  # fmt: skip
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    batch = tiny_batch(student)
    seen, halfway = logits(student, batch), type(student).from_pretrained(tmp_path / "checkpoint-8").eval()
    student = trainer.finish().eval()
    assert all(type(m) is CodebookLinear for n, m in packed_modules(student) if n in layers)
    for name, (words, levels) in before.items():
        layer = student.get_submodule(name)
        assert torch.equal(layer.qweight, words) and not torch.equal(layer.levels, levels)
        assert torch.equal(layer.levels, halfway.get_submodule(name).levels)
    # the same numbers, multiplied in another order: by the kernels of inference
    torch.testing.assert_close(logits(student, batch), seen, rtol=1e-4, atol=1e-4)
    student.save_pretrained(tmp_path / "saved")
    opened = type(student).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(opened, batch), logits(student, batch))


def test_an_embedder_follows_the_vectors_of_its_teacher(tmp_path):
    teacher = tiny_model("bert").base_model
    student = hfc.quantize(copy.deepcopy(teacher), 2, group_size=16)
    trainer = trainer_of(tmp_path, student, teacher, "classification", max_steps=12)
    assert type(student) is type(AutoModel.from_config(student.config)) and not trainer.needs_logits
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    hidden = [m(**tiny_batch(m)).last_hidden_state for m in (trainer.model.eval(), teacher)]
    assert first > 0 and trainer.is_finished and nn.functional.mse_loss(*hidden) < 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scales_are_stored_in_the_dtype_that_was_asked_for(dtype, tmp_path):
    student, teacher = pair()
    trainer = trainer_of(tmp_path, student, teacher, scale_dtype=dtype, finish_at_end=False)
    trainer.train()
    seen = logits(student, tiny_batch(student))
    trainer.finish()
    layers = [m for m in student.modules() if isinstance(m, PackedLinear)]
    assert (
        {m.scales.dtype for m in layers}
        == {getattr(torch, dtype)}
        == {getattr(torch, m.scheme.scale_dtype) for m in layers}
    )
    torch.testing.assert_close(logits(student, tiny_batch(student)), seen, rtol=1e-4, atol=1e-4)


def test_zero_points_learn_and_stay_whole(tmp_path):
    student, teacher = pair()
    before = {n: m.packed_weight().zeros.clone() for n, m in student.named_modules() if isinstance(m, PackedLinear)}
    trainer = trainer_of(tmp_path, student, teacher, zero_point_rate=20.0, max_steps=8, finish_at_end=False)
    trainer.train()
    seen = logits(student, tiny_batch(student))
    trainer.finish()
    after = {n: student.get_submodule(n).packed_weight().zeros for n in before}
    assert any((after[n] != zeros).any() for n, zeros in before.items())
    torch.testing.assert_close(logits(student, tiny_batch(student)), seen, rtol=1e-4, atol=1e-4)


def test_norms_stay_without_a_rate_and_all_else_learns_again_afterwards(tmp_path):
    student, teacher = pair()
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    trainer_of(tmp_path, student, teacher, norm_rate=0.0).train()
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in student.named_parameters())


def test_act_order_and_gptq(tmp_path):
    teacher = tiny_model("llama", seed=3)
    ids = torch.randint(5, 60, (40, 16), generator=torch.Generator().manual_seed(0))
    calibration = [{"input_ids": row.tolist()} for row in ids]
    student = hfc.quantize(
        copy.deepcopy(teacher), 2, method="gptq", group_size=16, desc_act=True, calibration=calibration
    )
    assert any(m.g_idx is not None for m in student.modules() if isinstance(m, PackedLinear))
    trainer = trainer_of(tmp_path, student, teacher, max_steps=12)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first


def test_a_cached_teacher_of_the_largest_logits(tmp_path):
    student, teacher = pair()
    cache = hfc.cache_teacher(teacher, rows(kind="clm"), tmp_path / "cache", top_k=64)
    losses = []
    for one in (teacher, cache):
        trainer = trainer_of(tmp_path, copy.deepcopy(student), one)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # logits are kept in half precision


def test_packed_blocks_learn_their_scales_and_keep_their_holes(tmp_path):
    teacher = tiny_model("bert")
    student = hfc.prepare_qat(copy.deepcopy(teacher), 4, group_size=8, activation_bits=None, embedding_bits=None)
    callbacks = [hfc.BlockPruning(0.6, block_size=8, begin=0.0, end=0.8, num_updates=1), hfc.QuantizationAware()]
    args = config(tmp_path, hfc.DistillationConfig, max_steps=4)
    hfc.DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows(), callbacks=callbacks).train()
    before, holes = integers(student), {n: m.dequantize() == 0 for n, m in packed_modules(student)}
    with pytest.raises(ValueError, match="zero_point_rate"):
        trainer_of(tmp_path, student, teacher, "classification", zero_point_rate=1.0)
    trainer_of(tmp_path, student, teacher, "classification").train()
    assert all(torch.equal(integers(student)[n], q) for n, q in before.items())
    assert all(torch.equal(m.dequantize() == 0, holes[n]) for n, m in packed_modules(student))
    student.save_pretrained(tmp_path / "saved")
    opened = type(student).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(opened, tiny_batch(opened)), logits(student.eval(), tiny_batch(student)))


def test_a_student_that_has_no_scales_is_refused_before_its_teacher_is_loaded(tmp_path):
    float_model = tiny_model("llama")
    blocks = tiny_model("bert")
    with torch.no_grad():
        for layer in blocks.bert.encoder.layer:
            layer.attention.output.dense.weight[:16] = 0
    hfc.to_block_sparse(blocks, block_size=8)
    args = config(tmp_path, ScaleConfig)
    for model, said in [
        (float_model, "no packed linear layer"),
        (blocks, "is a BlockSparseLinear, which has none"),
    ]:
        with pytest.raises(ValueError, match=said):
            ScaleTrainer(model, args, teacher_model=str(tmp_path / "nowhere"), train_dataset=rows(kind="clm"))
    short = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 3})
    with pytest.raises(ValueError, match="9 tokens, fewer than the 48 columns"):
        ScaleTrainer(pair()[0], args, teacher_model=str(tmp_path / "nowhere"), train_dataset=short)


def test_a_teacher_of_another_vocabulary_is_refused_by_its_config_alone(tmp_path):
    student, _ = pair()
    tiny_model("llama", vocab_size=99).config.save_pretrained(tmp_path / "teacher")  # there are no weights
    with pytest.raises(ValueError, match="vocab_size=64, the teacher vocab_size=99"):
        ScaleTrainer(student, config(tmp_path, ScaleConfig), teacher_model=str(tmp_path / "teacher"),
                     train_dataset=rows(kind="clm"))  # fmt: skip


def test_padding_is_no_text():
    padded = Dataset.from_dict({"input_ids": [[5, 6, 0, 0]] * 4, "attention_mask": [[1, 1, 0, 0]] * 4})
    check_amount(padded, 8)
    with pytest.raises(ValueError, match="8 tokens"):
        check_amount(padded, 9)


def test_settings_that_cannot_be_are_refused():
    for wrong, said in [({"norm_rate": -1}, "norm_rate"), ({"scale_dtype": "bfloat16"}, "scale_dtype"),
                        ({"alpha": 0.0}, "alpha")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ScaleConfig("out", **wrong)
    for student, teacher in (pair("gpt2"), pair("gpt2", symmetric=False, bits=2, grid="ternary")):
        with pytest.raises(ValueError, match="zero_point_rate .* stores none"):
            trainer_of("out", student, teacher, zero_point_rate=1.0)


def test_a_recipe_quantizes_and_then_trains_the_scales(tmp_path):
    from recipe_run import TRAIN, tiny_folder

    text = "\n".join(" ".join("abcdefghij"[(i * j) % 10] for j in range(20)) for i in range(60))
    (tmp_path / "texts.txt").write_text(text, encoding="utf-8")
    stages = [
        {"quantize": {"bits": 3, "group_size": 16, "embedding_bits": 8}},
        {"distil": {"method": "scales", **TRAIN}},
    ]
    recipe = hfc.Recipe(stages, model=tiny_folder(tmp_path / "llama", "llama"), task="causal-lm",
                        data={"source": str(tmp_path / "texts.txt"), "max_length": 16})  # fmt: skip
    output = recipe.run(tmp_path / "out").output
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert {entry["bits"] for entry in model.config.quantization_config["bits"].values()} == {3, 8}
    start = AutoModelForCausalLM.from_pretrained(next((tmp_path / "out" / "stages").glob("*rtn*")) / "model")
    assert all(torch.equal(integers(start)[n], q) for n, q in integers(model).items())
    both = zip(packed_modules(start), packed_modules(model), strict=True)
    changed = [not torch.equal(a.scales, b.scales) for (_, a), (_, b) in both if isinstance(a, PackedLinear)]
    assert all(changed)


def test_a_checkpoint_is_the_model_of_that_step(tmp_path):
    """Opened alone, it predicts what was evaluated then: new scales and new norms."""
    student, teacher = pair()
    trainer = trainer_of(tmp_path, student, teacher, max_steps=4, save_strategy="steps", save_steps=4,
                         scale_dtype="float32", finish_at_end=False)  # fmt: skip
    trainer.train()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    batch = tiny_batch(student)
    torch.testing.assert_close(logits(opened, batch), logits(student.eval(), batch), rtol=1e-4, atol=1e-4)
    finished = trainer.finish().state_dict()
    assert all(torch.equal(tensor, finished[name]) for name, tensor in opened.state_dict().items())
