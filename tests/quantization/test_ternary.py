"""Trained ternary quantization: values and gradients of the paper, and what is stored is what was evaluated."""

import pytest
import torch

import hf_compress as hfc
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.quantization.qat import QuantizationAware, fake_modules, prepare_qat
from hf_compress.quantization.ternary import THRESHOLD, TernaryQuantizer, TrainedTernary
from tests.helpers import tiny_batch, tiny_model
from tests.quantization.test_qat import arguments, dataset

OPTIONS = dict(grid="ternary", activation_bits=None, embedding_bits=8)


def test_values_and_gradients_are_those_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    w, upstream = (torch.randn(3, 9, generator=generator).double() for _ in range(2))
    w[0, 0] = 0.0
    largest = w.abs().amax(-1, keepdim=True)
    positive, negative = (torch.rand(3, 1, generator=generator).double() + 0.5 for _ in range(2))
    w[1] *= torch.where(w[1].abs() < 0.4 * largest[1], 0.01, 1.0)  # some below the threshold
    leaves = [t.requires_grad_() for t in (w, positive, negative)]
    y = TrainedTernary.apply(*leaves, THRESHOLD * largest)
    found = torch.autograd.grad((y * upstream).sum(), leaves)
    expected = [torch.zeros_like(t) for t in leaves]
    for n in range(3):
        for k in range(9):
            value, grad, delta = w[n, k].item(), upstream[n, k].item(), THRESHOLD * largest[n].item()
            if value > delta:
                assert y[n, k] == positive[n, 0]
                expected[0][n, k] = positive[n, 0].item() / largest[n].item() * grad
                expected[1][n, 0] += grad
            elif value < -delta:
                assert y[n, k] == -negative[n, 0]
                expected[0][n, k] = negative[n, 0].item() / largest[n].item() * grad
                expected[2][n, 0] -= grad
            else:
                assert y[n, k] == 0
                expected[0][n, k] = grad
    assert (y == 0).sum() >= 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_it_starts_from_the_nearest_values_and_the_threshold_follows_the_weights():
    weight = torch.tensor([[1.0, 0.5, -0.2, 0.01], [-1.0, -3.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    quantizer = TernaryQuantizer(weight, 2, learned=True)
    assert quantizer.threshold[:, 0, 0].tolist() == pytest.approx([0.05, 0.15, 0.0])
    assert quantizer.scale[:, 0].tolist() == [pytest.approx([0.75, 0.2]), pytest.approx([1.025, 2.0]), [0.0, 0.0]]
    expected = [[0.75, 0.75, -0.2, 0.0], [-2.0, -2.0, 0.0, 0.0], [0.0] * 4]
    torch.testing.assert_close(quantizer.eval()(weight), torch.tensor(expected), rtol=1e-3, atol=0)  # float16
    assert torch.equal(quantizer(10 * weight) != 0, 10 * weight.abs() > quantizer.threshold[:, 0])  # as it was
    quantizer.train()(10 * weight)
    assert quantizer.threshold[:, 0, 0].tolist() == pytest.approx([0.5, 1.5, 0.0])


@pytest.mark.parametrize("columns", [-1, 8])
def test_a_part_of_a_weight_keeps_its_part_of_the_grid(columns):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    whole = TernaryQuantizer(weight, 2, columns=columns, learned=True).eval()
    rows, some = [0, 3, 7], [1, 2, 9] if columns == -1 else list(range(8, 16))
    part = whole.select(rows, None).select(None, some).eval()
    assert torch.equal(part(weight[rows][:, some]), whole(weight)[rows][:, some])
    assert isinstance(part.scale, torch.nn.Parameter) and part.threshold.shape == part.scale[..., :1].shape


@pytest.mark.parametrize("family, group_size", [("bert", -1), ("gpt2", 16)])
def test_what_is_stored_is_what_was_evaluated_and_two_values_were_learned(family, group_size, tmp_path):
    task = "classification"
    teacher = tiny_model(family, task, pad_token_id=0)
    student = prepare_qat(tiny_model(family, task, pad_token_id=0), 2, group_size=group_size, **OPTIONS)
    before = {n: m.weight_quantizer.scale.detach().clone() for n, m in fake_modules(student) if "embed" not in n}
    args = arguments(tmp_path, hfc.DistillationConfig, finish_at_end=False, max_steps=3)
    trainer = hfc.DistillationTrainer(student, args, teacher_model=teacher, train_dataset=dataset(student),
                                      callbacks=[QuantizationAware(refresh_steps=1)])  # fmt: skip
    trainer.train()
    student.eval()
    batch, learned = tiny_batch(student), dict(fake_modules(student))
    moved = [learned[n].weight_quantizer.scale.detach() - old for n, old in before.items() if n in learned]
    assert all((change != 0).any(dim=(0, 1)).all() for change in moved if change.shape[-1] == 2)
    with torch.no_grad():
        seen = student(**batch).logits
        student = trainer.finish().eval()
        torch.testing.assert_close(student(**batch).logits, seen, rtol=1e-5, atol=1e-5)  # another product
    layers = [m for m in student.modules() if isinstance(m, CodebookLinear)]
    assert layers and all(m.scheme.num_levels == 3 and (m.levels[..., 1] == 0).all() for m in layers)
    assert any((m.levels[..., 0] != -m.levels[..., 2]).any() for m in layers)
    student.save_pretrained(tmp_path / "saved")
    opened = type(student).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(opened(**batch).logits, student(**batch).logits)
    with pytest.raises(ValueError, match="codebooks"):
        hfc.export(student, tmp_path / "gptq", format="gptq")


def test_a_weight_that_is_used_twice_in_a_pass_has_the_gradients_of_both_uses():
    """As those that DeBERTa projects tokens and relative positions by."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantizer = TernaryQuantizer(weight.detach(), 2, learned=True).train()
    x, y = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    learned = [weight, quantizer.scale]
    both = torch.autograd.grad((x @ quantizer(weight).T).sum() + (y @ quantizer(weight).T).sum(), learned)
    once = torch.autograd.grad(((x + y) @ quantizer(weight).T).sum(), learned)
    for one, other in zip(both, once, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options, message", [
    (dict(activation_bits=8), r"\['activation_bits'\] say something else"),
    (dict(num_groups=4), "num_groups"),
    (dict(symmetric=True, learned_steps=True), r"\['learned_steps', 'symmetric'\]"),
    (dict(range_method="kl"), "range_method"),
    (dict(rounded_share=0.5), "rounded_share"),
    (dict(bits={"bert.encoder.layer.0.output.dense": 2, "classifier": 4}), "classifier: .*in 2 bits a weight"),
    (dict(bits=4), "layer.0.*stored in 2 bits a weight, got bits=4"),
    (dict(grid="kmeans"), "grid must be 'uniform' or 'ternary'"),
])  # fmt: skip
def test_bad_input_is_refused(options, message):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, **{**dict(bits=2), **OPTIONS, **options})
    assert not any(fake_modules(model))


@pytest.mark.parametrize("more", [[], [hfc.BlockPruning(0.5, block_size=8)]], ids=["stages", "blocks"])
def test_stages_of_bits_and_blocks_are_refused_before_the_first_step(more, tmp_path):
    model = prepare_qat(tiny_model("bert"), 2, **OPTIONS)
    aware = QuantizationAware() if more else QuantizationAware(start_bits=8)
    args, teacher = arguments(tmp_path, hfc.DistillationConfig), tiny_model("bert")
    with pytest.raises(ValueError, match="has a ternary grid: it has 2 bits from the start"):
        hfc.DistillationTrainer(model, args, teacher_model=teacher, train_dataset=dataset(model),
                                callbacks=[*more, aware])  # fmt: skip
