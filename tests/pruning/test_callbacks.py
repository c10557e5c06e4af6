"""Pruning callbacks in trainers of every kind: masks hold, compose, survive resume, and end in a smaller model."""

import copy
import gc
import weakref

import pytest
import torch
from distillation.data import rows
from helpers import tiny_batch, tiny_model
from silence import logits
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.importance.gates import mean_absolute_gradients
from hf_compress.pruning.masks import Blocks, layer_projections
from hf_compress.pruning.scores import GateGradient, Taylor
from hf_compress.training.state import TrainingStateMixin


class OurTrainer(TrainingStateMixin):
    """A plain Trainer that keeps a training state."""


def arguments(folder, kind=TrainingArguments, **options):
    defaults = dict(use_cpu=True, max_steps=8, per_device_train_batch_size=4, logging_strategy="no", report_to="none",
                    save_strategy="no", disable_tqdm=True, learning_rate=1e-3)  # fmt: skip
    return kind(str(folder), **{**defaults, **options})


def train(folder, callback, model=None, kind=OurTrainer, data=None, resume=None, **options):
    """A model trained with the callback, not yet finished."""
    model = tiny_model("bert") if model is None else model
    family = model.config.model_type
    data = rows(kind="clm" if family in ("gpt2", "llama") else "classification") if data is None else data
    extra = {}
    configs = {hfc.DistillationTrainer: hfc.DistillationConfig, hfc.TinyBertTrainer: hfc.TinyBertConfig}
    if kind in configs:
        options = {"kind": configs[kind], "finish_at_end": False, **options}
        extra = {"teacher_model": tiny_model("bert", seed=3)}
    trainer = kind(model, arguments(folder, **options), train_dataset=data, callbacks=[callback], **extra)
    trainer.train(resume_from_checkpoint=resume)
    return model.eval()


QUICK = dict(begin=0.0, end=0.8, num_updates=3)
CALLBACKS = {
    "heads": lambda: hfc.HeadPruning(0.4, **QUICK),
    "neurons": lambda: hfc.NeuronPruning(0.5, **QUICK),
    "magnitude": lambda: hfc.WeightPruning(0.6, proximal=1e-3, **QUICK),
    "movement": lambda: hfc.WeightPruning(0.6, method="movement", scope="class-uniform", **QUICK),
    "wanda": lambda: hfc.WeightPruning(0.5, method="wanda", scope="bank", bank_size=4, **QUICK),
    "distribution": lambda: hfc.WeightPruning(0.6, scope="class-distribution", **QUICK),
    "blocks": lambda: hfc.BlockPruning(0.7, block_size=8, method="max", group_lasso=0.1, **QUICK),
    "block-movement": lambda: hfc.BlockPruning(0.7, block_size=8, method="movement", **QUICK),
    "block-taylor": lambda: hfc.BlockPruning(0.7, block_size=8, method="taylor", **QUICK),
    "two-slopes": lambda: hfc.BlockPruning(0.7, block_size=4, method="max", schedule="two-slopes", **QUICK),
    "fixed": lambda: hfc.WeightPruning(0.6, schedule="fixed", **QUICK),
    "grow": lambda: hfc.WeightPruning(0.6, grow=0.3, **QUICK),
    "row-penalties": lambda: hfc.NeuronPruning(0.5, incoming=0.1, outgoing=0.1, norm="max", **QUICK),
    "dsd": lambda: hfc.WeightPruning(0.6, begin=0.0, end=0.5, num_updates=2, regrow=0.75),
    "layers": lambda: hfc.LayerPruning(0.5),
    "gates": lambda: hfc.HeadGates(1.0),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resumed_training_ends_in_the_same_bits(name, tmp_path):
    """Dropout on; saved after step 4 of 8, taken up by a new model, trainer and callback."""
    data = rows()
    whole, again = CALLBACKS[name](), CALLBACKS[name]()
    expected = train(tmp_path, whole, data=data, save_strategy="steps", save_steps=4)
    found = train(tmp_path, again, tiny_model("bert", seed=9), data=data, resume=str(tmp_path / "checkpoint-4"))
    for (key, tensor), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
    if name not in ("layers", "gates"):
        assert all(torch.equal(mask, again.masks[key]) for key, mask in whole.masks.items())
        assert whole.current_sparsity == again.current_sparsity
    if name == "gates":
        assert all(map(torch.equal, whole.gates(), again.gates()))


@pytest.mark.parametrize("kind", [Trainer, OurTrainer, hfc.DistillationTrainer, hfc.TinyBertTrainer])
@pytest.mark.parametrize("name", ["heads", "blocks"])
def test_a_callback_prunes_in_any_trainer(kind, name, tmp_path):
    callback = CALLBACKS[name]()
    model = train(tmp_path, callback, kind=kind)
    assert callback.current_sparsity == pytest.approx({"heads": 6 / 16, "blocks": 0.7}[name], abs=0.01)
    for name, mask in callback.masks.items():
        weight = model.get_submodule(name).weight
        zero = weight.unflatten(0, (mask.shape[0], -1)).unflatten(2, (mask.shape[1], -1)).abs().amax(dim=(1, 3)) == 0
        assert torch.equal(zero, ~mask)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(hook.__module__.startswith("hf_compress") for hook in hooks)


def test_two_callbacks_prune_side_by_side(tmp_path):
    model = tiny_model("bert")
    heads, neurons = CALLBACKS["heads"](), CALLBACKS["neurons"]()
    args = arguments(tmp_path, hfc.DistillationConfig, finish_at_end=False)
    teacher = tiny_model("bert", seed=3)
    trainer = hfc.DistillationTrainer(
        model, args, teacher_model=teacher, train_dataset=rows(), callbacks=[heads, neurons]
    )
    trainer.train()
    size = model.num_parameters()
    neurons.finish(heads.finish(model))
    assert sum(a.num_heads for a in anatomy(model).attentions) == 10
    assert sum(layer.feed_forward.num_neurons for layer in anatomy(model).layers) == 96
    assert model.num_parameters() < size
    with pytest.raises(ValueError, match="a trainer can hold one HeadPruning"):
        hfc.DistillationTrainer(
            tiny_model("bert"), args, teacher_model=teacher, callbacks=[CALLBACKS["heads"](), CALLBACKS["heads"]()]
        )


@pytest.mark.parametrize("name", ["heads", "neurons", "blocks"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_finish_cuts_and_changes_no_logit(family, name, tmp_path):
    callback = CALLBACKS[name]()
    model = train(tmp_path, callback, tiny_model(family)).double()
    batch, size = tiny_batch(model), model.num_parameters()
    expected = logits(model, batch)
    assert callback.finish(model) is model
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-12)
    if name != "blocks":
        assert model.num_parameters() < size
    model.save_pretrained(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small", dtype=torch.float64).eval()
    # read tensors may begin at another address, and float64 products differ by an order of sums there
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=0, atol=1e-14)


class Spy(TrainerCallback):
    """Sums -w * dL/dw of one matrix in float64, where the gradient of a step is ready."""

    def __init__(self, module):
        self.module, self.sum = module, torch.zeros_like(module.weight, dtype=torch.float64)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.sum -= self.module.weight.detach().double() * self.module.weight.grad.double()


def test_movement_scores_are_accumulated_products(tmp_path):
    model = tiny_model("bert")
    module = anatomy(model).layers[1].feed_forward.output
    spy, callback = Spy(module), hfc.WeightPruning(0.5, method="movement", begin=0.0, end=1.0, num_updates=1)
    trainer = OurTrainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[spy, callback])
    trainer.train()
    number = next(i for i, matrix in enumerate(callback._matrices) if matrix.module is module)
    torch.testing.assert_close(callback._kept("score", number).double(), spy.sum, rtol=1e-4, atol=1e-9)
    scores = torch.cat([callback._kept("score", i).flatten() for i in range(len(callback._matrices))])
    lowest = scores.double().sort().values[: len(scores) // 2]
    masks = torch.cat([mask.flatten() for mask in callback.masks.values()])
    assert scores[~masks].max() <= lowest[-1] + 1e-12 and int((~masks).sum()) == len(scores) // 2


def test_scores_by_gradient_keep_no_activation():
    """A hook that holds the tensor it is registered on keeps each step's graph until the process ends."""
    linear = torch.nn.Linear(6, 4)
    matrix, score = Blocks("map", linear, (4, 2)), GateGradient(normalize=False)
    handles = score.open(linear, [matrix])
    x = torch.randn(2, 3, 6, requires_grad=True) * 1.0
    linear(x).sum().backward()
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None and score.seen[0] is not None
    for handle in handles:
        handle.remove()


def test_taylor_scores_are_squared_products_of_blocks():
    """Two steps on a 4 x 6 matrix with blocks of 2 x 3, one weight at a time in float64."""
    linear = torch.nn.Linear(6, 4, bias=False)
    matrix, score, expected = Blocks("map", linear, (2, 3)), Taylor(), torch.zeros(2, 2, dtype=torch.float64)
    buffer = score.buffer(matrix)
    for seed in range(2):
        linear.weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        score.gather(0, matrix, buffer)
        products = linear.weight.detach().double() * linear.weight.grad.double()
        for row in range(2):
            for column in range(2):
                block = products[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                expected[row, column] += sum(block.flatten().tolist()) ** 2
    torch.testing.assert_close(score.scores(0, matrix, buffer).double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_head_importance_in_training_is_that_of_each_example(accumulation, tmp_path):
    """One step over 8 examples: the gathered sums are the gradients of single examples, absolute before the sum."""
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    data, reference = rows(8), copy.deepcopy(model).double()
    attentions = anatomy(reference).attentions
    expected = mean_absolute_gradients(
        reference, [{key: torch.tensor(data[key]) for key in data.column_names}], [a.output for a in attentions],
        [a.head_dim for a in attentions],
    )  # fmt: skip
    callback = hfc.HeadPruning(0.4, begin=0.0, end=1.0, num_updates=1)
    callback.training_state_entries(model)
    size = 8 // accumulation

    class Stop(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            self.sums = [callback._kept("score", i).clone() for i in range(4)]

    stop = Stop()
    trainer = OurTrainer(
        model,
        arguments(tmp_path, max_steps=2, gradient_accumulation_steps=accumulation, per_device_train_batch_size=size),
        train_dataset=data, callbacks=[callback],
    )  # fmt: skip
    trainer.callback_handler.callbacks.insert(0, stop)
    trainer.args.max_steps = 2
    seen = []
    stop.on_step_end = lambda *args, **kwargs: seen.append(stop.sums)
    trainer.train()
    for sums, row in zip(seen[0], expected, strict=True):
        torch.testing.assert_close((sums / sums.norm()).double(), row / row.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_wanda_scores_weigh_by_the_norm_of_real_tokens(checkpointing, tmp_path):
    """Gradient checkpointing runs a layer twice in a step, on the same tokens."""
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    reference, data = copy.deepcopy(model), rows(8)
    module = anatomy(reference).layers[2].attention.query
    inputs = {key: torch.tensor(data[key]) for key in data.column_names}
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    reference(**inputs)
    real = seen[0][inputs["attention_mask"].bool()]  # (tokens, K)
    expected = module.weight.detach().double().abs() * real.norm(dim=0)
    callback = hfc.WeightPruning(0.5, method="wanda", scope="row", schedule="one-shot", begin=0.0)
    scores = []
    number = [name for name, m in reference.named_modules() if m is module]
    original = callback.score.scores
    callback.score.scores = lambda *args: scores.append(original(*args)) or scores[-1]
    options = {} if checkpointing is None else dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": checkpointing}
    )  # fmt: skip
    options |= dict(max_steps=1, per_device_train_batch_size=8, learning_rate=1e-9)
    train(tmp_path, callback, model, data=data, **options)
    place = [matrix.name for matrix in callback._matrices].index(number[0])
    torch.testing.assert_close(scores[place].double(), expected, rtol=1e-3, atol=1e-6)
    assert (callback.masks[number[0]].sum(1) == 16).all()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_wanda_counts_the_tokens_that_each_map_sees(family):
    """The encoder's under its mask, also where the decoder looks at them; the decoder's where they have a label."""
    model = tiny_model(family).train()
    labels = torch.tensor([[5, 6, 7, -100, -100], [8, 9, 10, 11, 2]])  # as long as the encoder's rows
    inputs = {"input_ids": torch.full((2, 5), 9), "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])}
    matrices = layer_projections(model, anatomy(model))
    score, counted = hfc.WeightPruning(0.5, method="wanda").score, {}
    score.add = lambda number, value: counted.update({matrices[number].name: value})
    handles, seen = score.open(model, matrices), {}
    for matrix in matrices:
        note = lambda _, args, name=matrix.name: seen.update({name: args[0].detach()})  # noqa: E731
        handles.append(matrix.module.register_forward_pre_hook(note))
    model(**inputs, labels=labels)
    for handle in handles:
        handle.remove()
    for layer in anatomy(model).stacks[-1].layers:
        crossed = [
            f"{layer.attentions[1].name}.{n}" for n in (("k_proj", "v_proj") if family == "bart" else ("k", "v"))
        ]
        for name in (n for n in counted if n.startswith(layer.name)):
            real = inputs["attention_mask"].bool() if name in crossed else labels != -100
            torch.testing.assert_close(counted[name], seen[name][real].square().sum(0))


def test_dense_sparse_dense_lets_weights_grow_again(tmp_path):
    callback = CALLBACKS["dsd"]()
    weight = anatomy(train(tmp_path, callback)).layers[0].attention.query.weight
    assert callback.current_sparsity == 0 and float((weight == 0).float().mean()) < 0.05


def test_what_is_held_back_and_steep_grows_again_and_the_share_is_kept(tmp_path):
    """Masks of each update: some that was held back is alive later, which without `grow` never happens."""
    seen = {}
    for grow in (0.0, 0.3):
        callback = hfc.WeightPruning(0.6, grow=grow, begin=0.0, end=1.0, num_updates=4)
        seen[grow] = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, callback=callback, masks=seen[grow], **kwargs):
                masks.append(torch.cat([mask.flatten() for mask in callback.masks.values()]))

        trainer = OurTrainer(
            tiny_model("bert"),
            arguments(tmp_path, learning_rate=1e-2),
            train_dataset=rows(),
            callbacks=[callback, Watch()],
        )
        trainer.train()
        assert callback.current_sparsity == pytest.approx(0.6, abs=1e-3)
    levels = [callback._schedule.level(step) for step in (2, 4, 6, 8)]
    for masks in seen.values():
        shares = [1 - float(masks[step - 1].float().mean()) for step in (2, 4, 6, 8)]
        assert shares == pytest.approx(levels, abs=1e-3)
    came_back = [int((~masks[3] & masks[5]).sum()) for masks in seen.values()]  # with the update of step 6
    assert came_back[0] == 0 < came_back[1]


def test_a_fixed_threshold_takes_what_falls_below_it(tmp_path):
    callback = hfc.WeightPruning(0.5, schedule="fixed", begin=0.0, end=0.75, num_updates=3, proximal=0.05)
    model = tiny_model("bert")
    thresholds = {n: m.weight.abs().flatten().kthvalue(m.weight.numel() // 2).values
                  for n, m in model.named_modules() if n in {b.name for b in callback.matrices(model)}}  # fmt: skip
    train(tmp_path, callback, model, learning_rate=1e-2)
    assert callback.current_sparsity > 0.51  # half of it at once, and what the penalty has pushed under it since
    for number, name in enumerate(callback.masks):
        torch.testing.assert_close(callback._kept("quantile", number), thresholds[name].detach())


def test_group_lasso_shrinks_what_stays(tmp_path):
    norms = []
    for strength in (0.0, 20.0):
        callback = hfc.BlockPruning(0.5, block_size=8, group_lasso=strength, begin=0.0, end=1.0, num_updates=1)
        train(tmp_path, callback)
        norms.append(sum(float(m.weight.norm()) for m in callback._matrices))
    assert norms[1] < 0.8 * norms[0]


def test_given_and_random_importance_choose_the_heads(tmp_path):
    importance = torch.arange(16.0).reshape(4, 4)
    callback = hfc.HeadPruning(0.5, importance=importance, schedule="one-shot", begin=0.0)
    train(tmp_path, callback, kind=Trainer, max_steps=1)
    assert torch.equal(torch.stack([mask[0] for mask in callback.masks.values()]), importance >= 8)
    first, second = (hfc.HeadPruning(0.5, importance="random", schedule="one-shot", begin=0.0) for _ in range(2))
    train(tmp_path, first, max_steps=1), train(tmp_path, second, max_steps=1)
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())


def test_equal_widths_when_neurons_go_layer_by_layer(tmp_path):
    callback = hfc.NeuronPruning(0.5, scope="layer", **QUICK)
    model = callback.finish(train(tmp_path, callback))
    assert [layer.feed_forward.num_neurons for layer in anatomy(model).layers] == [24] * 4
    assert model.config.intermediate_size == 24 and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("kind", [Trainer, OurTrainer])
def test_the_best_checkpoint_is_one_that_is_pruned_and_comes_with_its_masks(kind, tmp_path):
    """Each evaluation is worse than the one before, so that the best is the first that counts: after step 6."""
    callback = hfc.HeadPruning(0.5, begin=0.5, end=0.7, num_updates=1, importance="random")
    model = tiny_model("bert")
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                     load_best_model_at_end=True, metric_for_best_model="rank", greater_is_better=False)  # fmt: skip
    trainer = kind(model, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[callback],
                   compute_metrics=lambda _: {"rank": trainer.state.global_step})  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    assert callback.current_sparsity == 0.5
    assert sum(a.num_heads for a in anatomy(callback.finish(model)).attentions) == 8


def test_a_stock_trainer_resumes_masks_and_refuses_what_it_cannot_keep(tmp_path):
    options = dict(kind=Trainer, save_strategy="steps", save_steps=4, data=rows())
    whole, again = CALLBACKS["blocks"](), CALLBACKS["blocks"]()
    expected = train(tmp_path, whole, **options)
    found = train(tmp_path, again, tiny_model("bert", seed=9), resume=str(tmp_path / "checkpoint-4"), **options)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
    with pytest.raises(ValueError, match="WeightPruning gathers scores over steps"):
        train(tmp_path, CALLBACKS["movement"](), resume=str(tmp_path / "checkpoint-4"), **options)
    with pytest.raises(ValueError, match="HeadGates learns parameters of its own, which a stock Trainer does not"):
        train(tmp_path, CALLBACKS["gates"](), kind=Trainer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hfc.BlockPruning(0.5, block_size=5), "block_size=5 does not divide .*, of shape"),
        (lambda: hfc.WeightPruning(0.5, scope="bank", bank_size=7), "bank_size=7 does not divide the 32 columns"),
        (lambda: hfc.HeadPruning(0.5, importance=torch.ones(3, 4)), r"importance must be \(4, 4\), got \(3, 4\)"),
        (lambda: hfc.NeuronPruning(0.5, importance=torch.ones(4, 9)), r"must tell of \[48, 48, 48, 48\] neurons"),
        (lambda: hfc.LayerPruning(keep=[0, 9]), r"keep must name layers from 0 to 3"),
    ],
    ids=["block-size", "bank-size", "heads", "neurons", "layers"],
)
def test_what_does_not_fit_the_model_is_said_before_training(make, message, tmp_path):
    trainer = OurTrainer(tiny_model("bert"), arguments(tmp_path), train_dataset=rows(), callbacks=[make()])
    with pytest.raises(ValueError, match=message):
        _ = trainer.training_state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hfc.HeadPruning(1.0), "at least 0 and below 1, got 1.0"),
        (lambda: hfc.HeadPruning(0.5, begin=0.9, end=0.2), "ends before it starts"),
        (lambda: hfc.HeadPruning(0.5, importance="best"), "importance must be a tensor or one of gradient, random"),
        (lambda: hfc.NeuronPruning(0.5, scope="bank"), "scope must be one of model, layer, got 'bank'"),
        (lambda: hfc.WeightPruning(0.5, method="magic"), "method must be one of magnitude, movement, wanda"),
        (lambda: hfc.WeightPruning(0.5, scope="all"), "scope must be one of class-blind"),
        (lambda: hfc.WeightPruning(0.5, bank_size=4), "bank_size belongs to scope='bank'"),
        (lambda: hfc.WeightPruning(0.5, scope="bank"), "bank_size belongs to scope='bank'"),
        (lambda: hfc.WeightPruning(0.5, scope="bank", bank_size=0), "bank_size must be at least 1"),
        (lambda: hfc.WeightPruning(0.5, proximal=-1.0), "proximal is the strength of a penalty"),
        (lambda: hfc.WeightPruning(0.5, regrow=0.3), "regrow must lie between the end of pruning"),
        (lambda: hfc.WeightPruning(0.5, method="movement", schedule="two-slopes"), "is a threshold on magnitudes"),
        (lambda: hfc.WeightPruning(0.5, method="wanda", schedule="fixed"), "is a threshold on magnitudes"),
        (lambda: hfc.WeightPruning(0.5, grow=1.0), "grow is a share below 1"),
        (lambda: hfc.WeightPruning(0.5, method="movement", grow=0.1), "score told from weights alone"),
        (lambda: hfc.BlockPruning(0.5, method="max", schedule="one-shot", grow=0.1), "with schedule='cubic'"),
        (lambda: hfc.NeuronPruning(0.5, grow=0.1), "score told from weights alone"),
        (lambda: hfc.BlockPruning(0.5, block_size=0), "block_size must be at least 1"),
        (lambda: hfc.BlockPruning(0.5, method="magic"), "method must be one of max, norm, movement, taylor"),
        (lambda: hfc.BlockPruning(0.5, group_lasso=-1.0), "group_lasso is the strength of a penalty"),
        (lambda: hfc.LayerPruning(1.0), "drop_rate is a probability"),
        (lambda: hfc.LayerPruning(share=1.0), "share of layers that go must lie between 0 and 1"),
        (lambda: hfc.HeadGates(-1.0), "l0 must be 0 or more"),
    ],
    ids=lambda value: None if callable(value) else value[:24],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_distil_prune_and_quantize_in_one_run(tmp_path):
    """Blocks stay zero on the grid of a model whose weights are fake-quantized."""
    student = hfc.prepare_qat(tiny_model("bert"), bits=8)
    callback = CALLBACKS["blocks"]()
    model = train(tmp_path, callback, student, kind=hfc.TinyBertTrainer)
    assert callback.current_sparsity == pytest.approx(0.7, abs=0.01)
    module = anatomy(model).layers[0].feed_forward.output
    fake = module.fake_weight().detach()
    assert torch.equal(fake == 0, (fake == 0) | (module.weight == 0)) and float((fake == 0).float().mean()) > 0.3
