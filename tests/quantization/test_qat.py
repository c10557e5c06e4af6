"""Fake quantization and Q-BERT: gradients by hand, packed logits equal to the trained ones."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.quantization.fake_quantize import ActivationQuantizer, WeightQuantizer, fake_quantize
from hf_compress.quantization.qat import QuantizationAware, bundle_size, fake_modules, pack_qat, prepare_qat
from hf_compress.quantization.qbert import QBertConfig, QBertTrainer
from hf_compress.training.finish import finish
from tests.helpers import tiny_batch, tiny_model


def test_gradient_passes_inside_the_range_and_stops_outside():
    x = torch.tensor([[-9.0, -0.4, 0.3, 1.2, 9.0]], requires_grad=True)
    y = fake_quantize(x, torch.tensor([[1.0]]), torch.tensor([[1.0]]), 2)  # grid -1, 0, 1, 2
    assert y.tolist() == [[-1.0, 0.0, 0.0, 1.0, 2.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def test_learned_step_has_the_gradient_of_the_paper():
    x = torch.tensor([[-9.0, -0.4, 0.3, 1.2, 9.0]])
    scale = torch.tensor([[1.0]], requires_grad=True)
    fake_quantize(x, scale, torch.tensor([[1.0]]), 2, learned=True).sum().backward()
    # inside: round(v) - v = 0.4, -0.3, -0.2; clipped below: -1, above: 2; over sqrt(5 values * 3)
    assert scale.grad.item() == pytest.approx((0.4 - 0.3 - 0.2 - 1 + 2) / 15**0.5)


@pytest.mark.parametrize(("rows", "columns"), [(1, -1), (4, -1), (1, 8), (2, 4)])
@pytest.mark.parametrize("learned", [False, True], ids=["searched", "learned"])
def test_a_part_of_a_weight_keeps_its_part_of_the_grid(rows, columns, learned):
    """Rows cut through bundles, columns in whole groups: the quantized part is the part of the quantized whole."""
    weight = torch.randn(8, 16)
    whole = WeightQuantizer(weight, 3, rows=rows, columns=columns, learned=learned).eval()
    mine, wide = [0, 3, 4, 7], [4, 5, 6, 7] if columns == 4 else list(range(8, 16)) if columns == 8 else [1, 2, 9]
    part = whole.select(mine, None).select(None, wide).eval()
    assert torch.equal(part(weight[mine][:, wide]), whole(weight)[mine][:, wide])
    assert torch.equal(part.quantize(weight[mine][:, wide]).dequantize(), whole(weight)[mine][:, wide])
    assert isinstance(part.scale, torch.nn.Parameter) == learned
    assert torch.equal(whole.select(None, wide)(weight[:, wide]), whole(weight)[:, wide])
    if columns > 0:
        with pytest.raises(ValueError, match=f"Groups of {columns} columns cannot be cut in the middle"):
            whole.select(None, [0, 1, 2])


@pytest.mark.parametrize("learned", [False, True], ids=["searched", "learned"])
def test_quantization_noise_rounds_a_share_and_leaves_the_others_exact(learned):
    torch.manual_seed(0)
    weight = torch.randn(50, 80, requires_grad=True)
    quantizer = WeightQuantizer(weight.detach(), 2, range_method="percentile", learned=learned, rounded_share=0.3)
    rounded = quantizer.eval()(weight).detach()
    assert (rounded != weight).float().mean() > 0.99  # in evaluation all are rounded
    noisy = quantizer.train()(weight)
    is_rounded = noisy != weight
    assert torch.equal(noisy[is_rounded], rounded[is_rounded])
    assert is_rounded.float().mean() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)  # four deviations
    assert not torch.equal(quantizer(weight) != weight, is_rounded)  # another draw each time
    noisy.sum().backward()
    assert (weight.grad[~is_rounded] == 1).all()  # exact, also where rounding would clip
    table = WeightQuantizer(weight.detach(), 2, rounded_share=0.3).train()
    looked_up = table.look_up(torch.arange(50), weight, None)
    assert 0.2 < (looked_up != weight).float().mean() < 0.4


def test_a_model_trained_with_noise_is_packed_with_its_evaluated_logits():
    model = prepare_qat(tiny_model("bert"), 3, rounded_share=0.5, activation_bits=None, embedding_bits=8)
    batch = tiny_batch(model)
    assert not torch.equal(model.train()(**batch).logits, model(**batch).logits)
    logits = model.eval()(**batch).logits
    torch.testing.assert_close(finish(model).eval()(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="rounded_share is a share"):
            prepare_qat(tiny_model("bert"), 3, rounded_share=share)


@pytest.mark.parametrize(("rows", "columns"), [(1, -1), (4, -1), (1, 8), (2, 4)])
def test_weight_quantizer_and_its_packed_form_agree(rows, columns):
    weight = torch.randn(8, 16)
    quantizer = WeightQuantizer(weight, 3, rows=rows, columns=columns).eval()
    assert quantizer.scale.shape == (8 // rows, 1 if columns == -1 else 16 // columns, 1)
    assert torch.equal(quantizer.quantize(weight).dequantize(), quantizer(weight))
    assert torch.equal(quantizer.unblocks(quantizer.blocks(weight)), weight)
    coarse = WeightQuantizer(weight, 2, rows=rows, columns=columns)
    assert (quantizer(weight) - weight).norm() < (coarse(weight) - weight).norm()


def test_bundles_divide_the_rows_of_a_head():
    linear = torch.nn.Linear(10, 384)
    assert bundle_size(linear, 128, None) == 3
    assert bundle_size(linear, 128, 32) == 2
    assert bundle_size(torch.nn.Linear(10, 64), 128, 32) == 1


def test_running_ranges_follow_training_and_rest_in_eval():
    quantizer = ActivationQuantizer()
    quantizer(torch.tensor([[-1.0, 3.0]]))
    assert quantizer.range() == (-1.0, 3.0)
    quantizer(torch.tensor([[-2.0, 1.0]]))
    assert quantizer.range() == pytest.approx((-1.05, 2.9))
    quantizer.eval()(torch.tensor([[-50.0, 50.0]]))
    assert quantizer.range() == pytest.approx((-1.05, 2.9))


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
def test_layers_that_gradient_checkpointing_runs_again_see_the_ranges_of_their_pass(reentrant):
    """Ranges are those of one look at each batch, and so are the gradients that follow from them."""
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    found = []
    for is_checkpointed in (False, True):
        model = prepare_qat(tiny_model("bert", **quiet), bits=4).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for seed in (1, 2):  # the second batch moves what the first one set
            batch = tiny_batch(model, seed=seed)
            model.zero_grad()
            model(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
        ranges = {n: m.input_quantizer.range() for n, m in fake_modules(model) if m.input_quantizer is not None}
        found.append((ranges, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (ranges, gradients), (again, gradients_again) = found
    assert again == ranges
    assert gradients_again.keys() == gradients.keys()
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())


def dataset(model, rows=32):
    batch = tiny_batch(model, batch=rows, length=8, padding=False)
    return Dataset.from_dict({"input_ids": batch["input_ids"].tolist(), "labels": [i % 2 for i in range(rows)]})


def arguments(tmp_path, kind=QBertConfig, **options):
    defaults = dict(per_device_train_batch_size=8, max_steps=6, learning_rate=1e-2, save_strategy="no")
    defaults |= dict(report_to="none", use_cpu=True, disable_tqdm=True)
    defaults |= {"finish_at_end": False} if kind is QBertConfig else {}  # so that both forms can be compared
    return kind(output_dir=str(tmp_path), **{**defaults, **options})


@pytest.mark.parametrize("options", [{}, {"learned_steps": True}, {"start_bits": 8, "lowering_ratio": 0.9}],
                         ids=["searched", "learned", "staged"])  # fmt: skip
def test_the_packed_model_has_the_trained_logits(options, tmp_path):
    model = tiny_model("bert")
    before = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    trainer = QBertTrainer(model, arguments(tmp_path, average_bits=2, refresh_steps=2, **options),
                           train_dataset=dataset(model))  # fmt: skip
    trainer.train()
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.weight, before)
    model.eval()
    batch = tiny_batch(model)
    with torch.no_grad():
        trained = model(**batch).logits
        packed = trainer.pack()
        assert torch.equal(packed(**batch).logits, trained)
    layer = packed.bert.encoder.layer[1].attention.self.query
    assert isinstance(layer, PackedLinear) and layer.scheme.bits == 2 and layer.scheme.activation_bits == 8
    assert isinstance(packed.bert.embeddings.word_embeddings, PackedEmbedding)
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(type(model).from_pretrained(tmp_path / "packed")(**batch).logits, trained)


def test_a_training_ends_in_the_packed_model(tmp_path):
    """`train` and `save_model` are all; who asks for it once more, by an older name too, gets the same model."""
    model = tiny_model("bert", num_hidden_layers=1)
    args = arguments(tmp_path, average_bits=4, max_steps=2, finish_at_end=True)
    trainer = QBertTrainer(model, args, train_dataset=dataset(model), eval_dataset=dataset(model))
    trainer.train()
    assert isinstance(model.bert.encoder.layer[0].output.dense, PackedLinear)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    batch = tiny_batch(model)
    expected = model.eval()(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    for again in (trainer.pack, trainer.finish, lambda: pack_qat(model), lambda: finish(model)):
        assert again() is model and torch.equal(model(**batch).logits, expected)
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(ValueError, match="Q-BERT writes into weights, but .* hold packed"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_calibrated_range_is_the_same_in_whatever_dtype_a_model_is_loaded(dtype, tmp_path):
    """Transformers builds a model under its dtype, and a scale of bfloat16 has three digits."""
    model = prepare_qat(tiny_model("bert", num_hidden_layers=1), 8).train()
    model(**tiny_batch(model))
    pack_qat(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    x = torch.randn(4, 32)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.in_features == 32:
            found = loaded.get_submodule(name).rounded(x)
            assert torch.equal(found, module.rounded(x)), name


def test_mixed_bits_keep_their_budget(tmp_path):
    model = tiny_model("bert")
    trainer = QBertTrainer(model, arguments(tmp_path, average_bits=2.5), train_dataset=dataset(model))
    sizes = {name: model.get_submodule(name).weight.numel() for name in trainer.bits}
    average = sum(trainer.bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert 2.3 < average <= 2.5
    assert len(set(trainer.bits.values())) > 1
    assert {n: m.weight_quantizer.bits for n, m in fake_modules(model) if n in trainer.bits} == trainer.bits


def test_bits_go_down_in_stages():
    model = prepare_qat(tiny_model("bert"), 2)
    callback = QuantizationAware(start_bits=8, lowering_ratio=0.5)
    state = type("State", (), {"global_step": 0, "max_steps": 32})()
    seen = []
    for step in range(32):
        state.global_step = step
        (callback.on_train_begin if step == 0 else callback.on_step_begin)(None, state, None, model=model)
        seen.append(dict(fake_modules(model))["bert.encoder.layer.0.output.dense"].weight_quantizer.bits)
    assert seen == [8] * 4 + [4] * 4 + [3] * 4 + [2] * 20


@pytest.mark.parametrize("learned", [False, True], ids=["searched", "learned"])
def test_the_best_checkpoint_is_one_of_the_final_bits_and_comes_back_whole(learned, tmp_path):
    """Every evaluation looks worse than the one before, so the first that counts is the best."""
    model, seen = tiny_model("bert", num_hidden_layers=1), []

    def worse_each_time(predictions):
        seen.append(torch.tensor(predictions.predictions))
        return {"score": -len(seen)}

    data = dataset(model)
    args = arguments(tmp_path, average_bits=2, start_bits=3, lowering_ratio=0.5, learned_steps=learned, refresh_steps=2,
                     max_steps=4, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
                     load_best_model_at_end=True, metric_for_best_model="score")  # fmt: skip
    trainer = QBertTrainer(model, args, train_dataset=data, eval_dataset=data, compute_metrics=worse_each_time)
    trainer.train()
    assert trainer.state.best_global_step == 2 and len(seen) == 4  # trained with 3, 2, 2 and 2 bits
    assert {m.weight_quantizer.bits for n, m in fake_modules(model) if n in trainer.bits} == {2}
    best = torch.tensor(trainer.predict(data).predictions)
    assert torch.equal(best, seen[1]) and not torch.equal(best, seen[3])
    batch = {"input_ids": torch.tensor(data["input_ids"])}
    torch.testing.assert_close(trainer.pack().eval()(**batch).logits, best)


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_training_that_stops_before_its_bits_are_reached_says_so(tmp_path, caplog):
    model = tiny_model("bert", num_hidden_layers=1)
    args = arguments(tmp_path, average_bits=2, start_bits=8)
    QBertTrainer(model, args, train_dataset=dataset(model), callbacks=[StopEarly()]).train()
    assert "has 8 bits instead of 2" in caplog.text


def test_a_prepared_model_saves_as_an_ordinary_one(tmp_path):
    model = prepare_qat(tiny_model("bert"), 4)
    model.save_pretrained(tmp_path)
    plain = type(tiny_model("bert")).from_pretrained(tmp_path)
    assert set(plain.state_dict()) == set(model.state_dict())


def test_conv1d_and_dynamic_activations_pack_too():
    model = prepare_qat(tiny_model("gpt2"), 8, dynamic_activations=True, embedding_bits=None).eval()
    batch = tiny_batch(model)
    trained = model(**batch).logits
    assert torch.equal(pack_qat(model)(**batch).logits, trained)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tied to lm_head.weight, which would not be rounded"):
        prepare_qat(tiny_model("gpt2"), 4)
    with pytest.raises(ValueError, match="no activation range"):
        pack_qat(prepare_qat(tiny_model("bert"), 4))
    with pytest.raises(ValueError, match="prepare_qat"):
        pack_qat(tiny_model("bert"))
    with pytest.raises(ValueError, match="average_bits"):
        arguments(tmp_path, average_bits=1)
    model = prepare_qat(tiny_model("bert"), 4, learned_steps=True)
    trainer = Trainer(model, arguments(tmp_path, TrainingArguments), train_dataset=dataset(model),
                      callbacks=[QuantizationAware()])  # fmt: skip
    with pytest.raises(ValueError, match="TrainingState"):
        trainer.train()


def test_looking_up_quantizes_the_same_rows():
    torch.manual_seed(0)
    table = torch.randn(20, 64, requires_grad=True)
    quantizer = WeightQuantizer(table.detach(), 2, range_method="mse")  # clips, so that some gradients are zero
    ids = torch.tensor([[1, 4, 1], [7, 0, 19]])
    upstream = torch.randn(2, 3, 64)
    looked_up, whole = quantizer.look_up(ids, table, None), quantizer(table)[ids]
    torch.testing.assert_close(looked_up, whole, rtol=0, atol=0)
    mine, theirs = (torch.autograd.grad((rows * upstream).sum(), table)[0] for rows in (looked_up, whole))
    torch.testing.assert_close(mine, theirs)
    assert (mine[[1, 4, 7, 0, 19]] == 0).any() and (mine[1] != 0).any()


@pytest.mark.parametrize("options", [{}, dict(share_att_key=True), dict(norm_rel_ebd="layer_norm", share_att_key=True)],
                         ids=["projected", "shared", "normed"])  # fmt: skip
@pytest.mark.parametrize("learned", [False, True], ids=["searched", "learned"])
def test_a_table_that_is_read_whole_is_on_its_grid_while_it_trains(options, learned):
    """DeBERTa reads the weight of its relative positions, it does not look them up."""
    model = prepare_qat(tiny_model("deberta-v2", **options), 4, embedding_bits=3, learned_steps=learned).train()
    batch = tiny_batch(model)
    model(**batch)  # ranges of activations
    table = model.deberta.encoder.rel_embeddings
    model.eval()(**batch).logits.sum().backward()
    gradient = table._parameters["weight"].grad
    assert table.weight.unique(dim=1).shape[1] > 1 and gradient.abs().sum() > 0  # straight through the rounding
    state = model.state_dict()["deberta.encoder.rel_embeddings.weight"]
    assert not torch.equal(state, table.weight)  # what is saved is as precise as ever
    with torch.no_grad():
        trained = model(**batch).logits
        assert torch.equal(pack_qat(model)(**batch).logits, trained)
    assert isinstance(model.deberta.encoder.rel_embeddings, PackedEmbedding)
