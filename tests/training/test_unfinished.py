"""What cannot be finished is refused before the first step, and what is best is done with what was asked for."""

import copy

import pytest
import torch
from distillation.data import rows
from helpers import tiny_batch, tiny_model
from peft import LoraConfig, get_peft_model
from pruning.test_callbacks import OurTrainer, arguments
from silence import logits
from torch import nn
from training.test_finish import train
from transformers import (
    EarlyStoppingCallback,
    LongT5Config,
    LongT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy

QUICK = {"begin": 0.0, "end": 0.7, "num_updates": 1, "importance": "random"}


class NoStep(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise AssertionError("a step was taken")


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, dropout_rate=0.0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()


def tiny_longt5() -> LongT5ForConditionalGeneration:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, dropout_rate=0.0)
    return LongT5ForConditionalGeneration(LongT5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()


class OwnLinear(nn.Linear):
    """A map that computes something of its own, which cutting its weight would not keep."""


def with_own_map():
    model = tiny_model("bert")
    model.bert.encoder.layer[1].attention.self.query.__class__ = OwnLinear
    return model


def with_adapter():
    return get_peft_model(tiny_model("bert"), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))


def prepared(**options):
    return hfc.prepare_qat(tiny_model("bert"), 4, **options)


def block_sparse():
    model = tiny_model("bert")
    nn.init.zeros_(model.bert.encoder.layer[0].attention.self.query.weight)
    return hfc.to_block_sparse(model, 16)


def heads():
    return hfc.HeadPruning(0.5, **QUICK)


def neurons(**options):
    return hfc.NeuronPruning(0.5, **QUICK, **options)


def blocks():
    return hfc.BlockPruning(0.5, block_size=8)


BY_WIDTH, NO_MODEL = "by the width of the model", "got PeftModel.*merge adapters first"
OWN, PACKED = "A OwnLinear cannot be cut", "quantized or block-sparse"
REFUSED = {
    "half-a-group-of-neurons": (
        lambda: prepared(group_size=16), neurons,
        "lose 1 columns at a time, but 16 of them share a scale.*Prune with multiple_of=16",
    ),
    "half-a-group-of-heads": (
        lambda: prepared(group_size=16), heads,
        "lose 8 columns at a time, but 16 of them share a scale.*Choose a group_size that divides 8",
    ),
    "half-a-group-behind-a-gate": (lambda: prepared(group_size=16), lambda: hfc.HeadGates(1.0), "16 of them share"),
    "uneven-neurons": (lambda: tiny_model("bert"), lambda: neurons(multiple_of=7), "does not divide the 48 neurons"),
    "heads-put-together-by-the-width": (lambda: tiny_model("longformer"), heads, BY_WIDTH),
    "gates-put-together-by-the-width": (lambda: tiny_model("longformer"), lambda: hfc.HeadGates(1.0), BY_WIDTH),
    "the-layer-that-holds-the-bias": (tiny_longt5, lambda: hfc.LayerPruning(keep=[1, 2, 3]), "must stay first"),
    "an-adapter-on-heads": (with_adapter, heads, NO_MODEL),
    "an-adapter-on-weights": (with_adapter, lambda: hfc.WeightPruning(0.5), NO_MODEL),
    "an-adapter-on-layers": (with_adapter, hfc.LayerPruning, NO_MODEL),
    "a-map-of-their-own": (with_own_map, heads, OWN),
    "a-map-of-their-own-in-blocks": (with_own_map, blocks, OWN),
    "weights-in-blocks": (block_sparse, lambda: hfc.WeightPruning(0.5), PACKED),
    "layers-in-blocks": (block_sparse, hfc.LayerPruning, PACKED),
    "grids-of-an-ordinary-model": (lambda: tiny_model("bert"), hfc.QuantizationAware, "model made by `prepare_qat`"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_finished_is_refused_before_the_first_step(case, tmp_path):
    """By our trainers when they are made or begin, by a stock Trainer when it begins."""
    make, callback, message = REFUSED[case]
    for kind in (OurTrainer, Trainer):
        callbacks = [callback(), NoStep()]
        with pytest.raises(ValueError, match=message):
            kind(make(), arguments(tmp_path), train_dataset=rows(), callbacks=callbacks).train()


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="in bundles of rows .num_groups=8. or in groups of columns .group_size=16."):
        prepared(num_groups=8, group_size=16)
    with pytest.raises(ValueError, match="prepare_qat writes into weights, but .* read-only"):
        hfc.prepare_qat(block_sparse(), 4)


def test_a_model_with_nothing_to_finish_stays_as_it_is():
    model = tiny_model("bert")
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert hfc.finish(model) is model
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])
    assert not hasattr(model.config, "quantization_config")


def test_a_range_that_saw_nothing_leaves_the_model_in_training_form(tmp_path):
    model = train("bert", ("heads", "static"), tmp_path).model
    fake = model.bert.encoder.layer[1].output.dense
    high = fake.input_quantizer.high.clone()
    fake.input_quantizer.high.copy_(fake.input_quantizer.low)
    expected = logits(model)
    with pytest.raises(ValueError, match="encoder.layer.1.output.dense has no activation range yet"):
        hfc.finish(model)
    assert torch.equal(logits(model), expected)
    fake.input_quantizer.high.copy_(high)
    hfc.finish(model)


SAVED = {  # what took part -> whether a file of the model as it is would answer otherwise
    ("layers",): "LayerPruning",
    ("heads", "static"): "Quantizers",
    ("neurons", "blocks"): None,
}


@pytest.mark.parametrize("kind", [OurTrainer, Trainer], ids=["ours", "stock"])
@pytest.mark.parametrize("pieces", SAVED, ids="+".join)
def test_a_model_that_is_saved_unfinished_says_so_once(pieces, kind, tmp_path, caplog):
    """Not in a checkpoint, which is the plain model, not for zeros, which are in the weights, and not once finished."""
    model = train("bert", pieces, tmp_path, kind=kind, save_strategy="steps", save_steps=1).model
    assert not caplog.records
    twin, expected = copy.deepcopy(model), logits(model)
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
    opened = type(model).from_pretrained(tmp_path / "0").eval()
    found = [record.getMessage() for record in caplog.records if "The weights alone are saved" in record.getMessage()]
    assert len(found) == (SAVED[pieces] is not None) and all(SAVED[pieces] in message for message in found)
    assert torch.allclose(logits(opened), expected, atol=1e-5) == (SAVED[pieces] is None)
    caplog.clear()
    hfc.finish(twin).save_pretrained(tmp_path / "finished")
    assert "The weights alone" not in caplog.text and not twin._state_dict_pre_hooks


def test_a_part_that_surgery_cannot_cut_stays(tmp_path):
    """Longformer's heads stay, as zeros, where blocks silenced them; its neurons go."""
    model = tiny_model("longformer")
    callback = hfc.BlockPruning(0.9, block_size=8, method="max", begin=0.0, end=0.5, num_updates=1)
    OurTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(), callbacks=[callback]).train()
    for attention in anatomy(model).attentions[:1]:
        nn.init.zeros_(attention.output.weight)
    model.double().eval()
    expected, neurons = logits(model), sum(layer.feed_forward.num_neurons for layer in anatomy(model).layers)
    hfc.finish(model)
    assert [a.num_heads for a in anatomy(model).attentions] == [4] * 4
    assert sum(layer.feed_forward.num_neurons for layer in anatomy(model).layers) < neurons
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-9)


def test_heads_that_share_a_position_bias_are_cut_with_the_layer_that_makes_it(tmp_path):
    model = tiny_t5()
    callbacks = [hfc.HeadPruning(0.5, **QUICK), hfc.LayerPruning(keep=[1, 2, 3])]
    OurTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(kind="seq2seq"), callbacks=callbacks).train()
    model.double().eval()
    batch = tiny_batch(model)
    expected = logits(model, batch)
    hfc.finish(model)
    assert sum(a.num_heads for a in anatomy(model).attentions) < 20 and len(anatomy(model).stacks[0].layers) == 1
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "pieces", [("heads", "layers", "per-token"), ("neurons", "blocks", "static", "bundles")], ids="+".join
)
def test_a_stock_trainer_evaluates_what_finish_gives(pieces, tmp_path):
    done = train("bert", pieces, tmp_path, kind=Trainer)
    trainer = Trainer(done.model, arguments(tmp_path), eval_dataset=rows(8, seed=5))
    before = trainer.evaluate()["eval_loss"]
    done.callbacks[0].finish(done.model)
    # float32, so that an input may fall to the next of 255 levels
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-2)
    assert done.callbacks[-1].finish(done.model) is done.model


def test_a_distillation_ends_in_the_small_model_and_can_be_evaluated(tmp_path):
    """Hints on layers that are gone are told no more; predictions are compared as before."""
    model, teacher, data = tiny_model("bert"), tiny_model("bert", seed=3), rows()
    args = arguments(tmp_path, hfc.DistillationConfig, max_steps=3, hints="2:2,4:4")
    trainer = hfc.DistillationTrainer(model, args, teacher_model=teacher, train_dataset=data, eval_dataset=data,
                                      callbacks=[hfc.LayerPruning(share=0.5), heads()])  # fmt: skip
    trainer.train()
    assert len(anatomy(model).layers) == 2
    metrics = trainer.evaluate()
    assert {"eval_soft_loss", "eval_task_loss"} <= metrics.keys() and "eval_hint_loss" not in metrics
    with pytest.raises(ValueError, match="hidden state|layers"):
        trainer.train()  # to learn from hints again, it would need other ones


class Falling:
    """Metrics of which each is worse than the one before, and the steps they were asked for at."""

    def __init__(self):
        self.count = 0

    def __call__(self, predictions) -> dict[str, float]:
        self.count += 1
        return {"score": -self.count}


def best(tmp_path, kind, config, model, callbacks=(), patience=2, **options):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    extra = {"teacher_model": options.pop("teacher_model")} if "teacher_model" in options else {}
    args = arguments(tmp_path, config, load_best_model_at_end=True, metric_for_best_model="score", max_steps=10,
                     **steps, **options)  # fmt: skip
    trainer = kind(model, args, train_dataset=rows(), eval_dataset=rows(4), compute_metrics=Falling(),
                   callbacks=[*callbacks, EarlyStoppingCallback(patience)], **extra)  # fmt: skip
    trainer.train()
    return trainer.state.best_global_step, trainer.state.global_step


@pytest.mark.parametrize("kind", [hfc.TinyBertTrainer, hfc.MiniLMTrainer], ids=["tinybert", "minilm"])
def test_the_best_of_two_phases_is_one_of_the_last_and_patience_counts_from_there(kind, tmp_path):
    """Each evaluation is worse: without phases the first were the best, and the training over after three."""
    config = hfc.TinyBertConfig if kind is hfc.TinyBertTrainer else hfc.MiniLMConfig
    options = {"teacher_model": tiny_model("bert", seed=3), "intermediate_share": 0.5}
    assert best(tmp_path, kind, config, tiny_model("bert", num_hidden_layers=2), **options) == (6, 8)
    pruning = hfc.HeadPruning(0.4, begin=0.0, end=0.7, num_updates=1, importance="random")
    found = best(tmp_path, kind, config, tiny_model("bert", num_hidden_layers=2), [pruning], **options)
    assert found == (7, 9)  # the later of the two


@pytest.mark.parametrize(
    ("make", "done"),
    [
        (lambda: hfc.NeuronPruning(0.5, **QUICK), 7),
        (lambda: hfc.BlockPruning(0.5, block_size=8, method="max", begin=0.0, end=0.4, num_updates=2), 4),
        (lambda: hfc.WeightPruning(0.5, begin=0.0, end=0.3, num_updates=1, regrow=0.6), 6),
        (lambda: hfc.HeadGates(1.0, end=0.5), 5),
        (lambda: hfc.LayerPruning(0.3), 1),
    ],
    ids=["neurons", "blocks", "dense-sparse-dense", "gates", "layers"],
)
@pytest.mark.parametrize("kind", [OurTrainer, Trainer], ids=["ours", "stock"])
def test_the_best_and_the_patience_begin_when_the_schedule_is_through(kind, make, done, tmp_path):
    callback = make()
    if kind is Trainer and isinstance(callback, hfc.HeadGates):
        pytest.skip("gates need one of our trainers")
    model = tiny_model("bert", num_hidden_layers=2)
    assert best(tmp_path, kind, type(arguments(tmp_path)), model, [callback]) == (done, min(done + 2, 10))


VERBS = {
    "prune_heads": lambda model, folder: hfc.prune_heads(model, {0: [1]}),
    "prune_neurons": lambda model, folder: hfc.prune_neurons(model, {0: [1]}),
    "merge_neurons": lambda model, folder: hfc.merge_neurons(model, {0: 1}),
    "prune_layers": lambda model, folder: hfc.prune_layers(model, [0]),
    "prune_vocabulary": lambda model, folder: hfc.prune_vocabulary(model, None, keep=[5]),
    "prune": lambda model, folder: hfc.prune(model, [], sparsity=0.5),
    "factorise_embeddings": lambda model, folder: hfc.factorise_embeddings(model, 4),
    "make_student": lambda model, folder: hfc.make_student(model, num_hidden_layers=1),
    "quantize": lambda model, folder: hfc.quantize(model, 8),
    "to_block_sparse": lambda model, folder: hfc.to_block_sparse(model, 8),
    "export": lambda model, folder: hfc.export(model, folder / "plain", format="plain"),
    "push_to_hub": lambda model, folder: hfc.push_to_hub(model, "user/name"),
}


@pytest.mark.parametrize("pieces", [("layers",), ("static",), ("gates", "groups")], ids="+".join)
def test_what_would_lose_what_training_left_open_is_refused(pieces, tmp_path):
    """Layers that are passed over would be cut a second time, a table would lose rows that its quantizer keeps."""
    model = train("bert", pieces, tmp_path).model
    expected = logits(model)
    for name, verb in VERBS.items():
        with pytest.raises(ValueError, match=rf"{name} would lose that: call hf_compress.finish\(model\) first"):
            verb(model, tmp_path)
    assert torch.equal(logits(model), expected)
    hfc.finish(model)
