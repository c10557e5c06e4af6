"""Counts against counts by hand; times against a clock that we turn."""

import json
from collections import Counter

import pytest
import torch
from helpers import FAMILIES, tiny_batch, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.layers.packed_embedding import PackedEmbedding, TiedHead
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.measuring.counting import multiply_adds, num_parameters, num_weights, sparsity
from hf_compress.measuring.isolated import How
from hf_compress.measuring.measure import load_model, measure, measure_sources
from hf_compress.measuring.stored import stored_size
from hf_compress.measuring.timing import Spread, peak_allocated_bytes, steady_seconds, time_interleaved
from hf_compress.model.inputs import example_batch

QUICK = dict(sequence_length=8, latency_rounds=2, throughput_rounds=2)


class BlockSparse(nn.Module):
    """Two of the four 4x4 blocks of an 8x8 matrix, as the block-sparse layers keep them."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.values = nn.Parameter(torch.ones(2, 4, 4))
        self.register_buffer("crow_indices", torch.tensor([0, 1, 2]))
        self.register_buffer("col_indices", torch.tensor([0, 1]))

    def forward(self, x):
        return x @ torch.block_diag(*self.values.mT)


class FakeClock:
    """Stands still unless `now` is moved."""

    now = 0.0

    def __call__(self):
        return self.now

    def cost(self, model, *, seconds):
        """From now on a forward of `model` takes that long for each example."""

        def advance(module, args, kwargs):
            self.now += seconds * len(kwargs["input_ids"])

        model.register_forward_pre_hook(advance, with_kwargs=True)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_multiply_adds_of_bert_equal_those_counted_by_hand(attn):
    model = tiny_model("bert", attn=attn)  # 4 layers, D = 32, feed-forward 48
    T = 10
    projections = 4 * 32 * 32  # query, key, value, output
    feed_forward = 2 * 32 * 48
    attention = 2 * T * 32  # scores and context, for each token
    head = 32 * 32 + 32 * 2  # pooler and classifier, on the first token
    expected = 4 * T * (projections + feed_forward + attention) + head
    for batch in (1, 3):
        assert multiply_adds(model, tiny_batch(model, batch=batch, length=T, padding=False)) == expected


def test_multiply_adds_of_gpt2_count_conv1d_and_the_vocabulary():
    model = tiny_model("gpt2")  # 4 layers, D = 32, feed-forward 128, V = 64
    T = 6
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 128 + 2 * T * 32
    assert multiply_adds(model, tiny_batch(model, batch=1, length=T)) == T * (4 * layer + 32 * 64)


def test_convolutions_are_counted():
    model = tiny_model("vit")  # 16x16 pixels, 3 channels, patches of 4x4, D = 32
    linear = sum(
        num_weights(m) * 17 for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"
    )
    expected = 16 * 3 * 4 * 4 * 32 + linear + 4 * 2 * 17 * 17 * 32 + num_weights(model.classifier)
    assert multiply_adds(model, tiny_batch(model)) == expected


def test_a_packed_layer_counts_as_the_layer_it_stands_for():
    model = tiny_model("bert")
    batch = tiny_batch(model)
    parameters, products = num_parameters(model), multiply_adds(model, batch)
    assert parameters == model.num_parameters()
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense = PackedLinear.like(layer.intermediate.dense, WeightScheme(bits=4, group_size=16))
    assert num_parameters(model) == parameters
    assert multiply_adds(model, batch) == products


def test_a_block_sparse_layer_counts_the_blocks_it_stores():
    model = nn.Sequential(BlockSparse(), nn.Linear(8, 2))
    assert num_parameters(model) == 2 * 16 + 8 * 2 + 2
    assert sparsity(model)["dropped_blocks"] == 0.5
    wrapped = nn.ModuleDict({"inner": model})
    wrapped.forward = lambda x: wrapped["inner"](x)
    assert multiply_adds(wrapped, {"x": torch.ones(3, 5, 8)}) == 5 * (2 * 16 + 8 * 2)


def test_a_head_tied_to_a_packed_embedding_stores_nothing():
    embedding = PackedEmbedding(16, 8, WeightScheme(bits=4))
    model = nn.ModuleList([embedding, TiedHead(embedding, nn.Parameter(torch.zeros(16)))])
    assert num_parameters(model) == 16 * 8 + 16


def test_rows_are_outputs_in_conv1d_too():
    conv = Conv1D(4, 2)  # 4 outputs, weight (2, 4)
    with torch.no_grad():
        conv.weight.fill_(1.0)[:, 0] = 0.0
    assert sparsity(conv) == {"weights": 0.25, "rows": 0.25, "columns": 0.0}


def test_zeros_are_reported_by_kind_and_still_counted():
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.weight[0] = 0.0  # one row of four
        linear.weight[1, 0] = 0.0
    assert sparsity(linear) == {"weights": 5 / 16, "rows": 1 / 4, "columns": 0.0}
    assert sparsity(torch.nn.Linear(4, 0)) == {"columns": 1.0}  # without an output: of no weight is nothing a share
    assert num_parameters(linear) == 20


def test_stored_size_is_that_of_the_files(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"not part of the model")
    files = [tmp_path / "model.safetensors", tmp_path / "config.json"]
    size_bytes, tensor_bytes, identity = stored_size(model, tmp_path)
    assert size_bytes == sum(file.stat().st_size for file in files)
    assert tensor_bytes == 4 * model.num_parameters()
    assert stored_size(model) == (size_bytes, tensor_bytes, identity)


def test_shards_are_summed(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert stored_size(model, tmp_path)[1] == 4 * model.num_parameters()


def test_bits_per_weight_follow_the_stored_dtype(tmp_path):
    tiny_model("bert").half().save_pretrained(tmp_path)
    found = measure(tmp_path, dtype=torch.float32, **QUICK)
    assert found.bits_per_weight == 16.0
    assert found.dtype == "float32"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_every_family_is_measured_on_random_tokens(family):
    model = tiny_model(family)
    found = measure(model, **QUICK)
    assert found.parameters == model.num_parameters()
    assert found.multiply_adds > 0
    assert found.peak_memory_bytes > 4 * found.parameters
    assert len(found.latency_ms.samples) == len(found.throughput.samples) == 2


def test_random_tokens_are_not_special():
    model = tiny_model("bart")  # padding 0, begin 1, end 2
    batch = example_batch(model, sequence_length=64)
    assert batch["input_ids"].shape == (32, 64)
    assert set(range(3, 64)) == set(batch["input_ids"].flatten().tolist())


def test_real_examples_are_used_when_given():
    model = tiny_model("vit")
    assert measure(model, inputs=tiny_batch(model), **QUICK).sequence_length is None
    model = tiny_model("bert")
    assert measure(model, inputs=tiny_batch(model, length=12), **QUICK).sequence_length == 12


def test_measuring_leaves_the_model_as_it_was():
    model = tiny_model("bert").train()
    model.classifier.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, **QUICK)
    assert model.training and not model.classifier.training
    assert not model._forward_hooks and all(not module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_calls_take_turns_and_warm_ups_are_left_out():
    clock, order = FakeClock(), []

    def call(name, seconds):
        def run():
            order.append(name)
            clock.now += seconds * (100 if len(order) <= 4 else 1)  # the first two rounds are slow

        return run

    calls = [call("A", 1.0), call("B", 2.0)]
    assert time_interleaved(calls, rounds=3, warmup_rounds=2, clock=clock) == [[1.0] * 3, [2.0] * 3]
    assert "".join(order) == "ABABABABAB"


@pytest.mark.parametrize("seconds, slow, before, counted", [
    (0.0035, 1, 17, 5), (0.0035, 8, 10, 5), (0.5, 1, 1, 1), (0.04, 1, 2, 1), (1e-6, 9, 100, 100),
])  # fmt: skip
def test_a_turn_is_as_many_calls_as_take_a_while_after_those_that_are_slow(seconds, slow, before, counted):
    """The first ones find caches full of what others left: twice as slow."""
    clock, calls = FakeClock(), []

    def call():
        calls.append(seconds)
        clock.now += seconds * (2 if len(calls) <= slow and seconds < 0.01 else 1)

    assert steady_seconds(call, clock=clock) == pytest.approx(seconds)
    assert len(calls) == before + counted


def test_no_call_has_a_place_of_its_own():
    order = []
    time_interleaved([lambda i=i: order.append(i) for i in range(3)], rounds=300, warmup_rounds=0)
    rounds = [order[i : i + 3] for i in range(0, 900, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in rounds)
    after = Counter(zip(order, order[1:], strict=False))
    assert all(after[i, i] == 0 for i in range(3))
    # six pairs share 899 steps: 150 each, give or take four times 11
    assert all(100 < after[i, j] < 200 for i in range(3) for j in range(3) if i != j)
    places = Counter((place, i) for turn in rounds for place, i in enumerate(turn))
    assert all(60 < places[place, i] < 140 for place in range(3) for i in range(3))


def test_times_become_latency_and_throughput():
    clock, models = FakeClock(), [tiny_model("bert"), tiny_model("bert", num_hidden_layers=1)]
    for model, seconds in zip(models, (0.004, 0.001), strict=True):
        clock.cost(model, seconds=seconds)
    rounds = dict(latency_rounds=2, throughput_rounds=2)
    found = measure_sources(models, models, How(sequence_length=8), **rounds, clock=clock)
    assert [one.latency_ms.median for one in found] == pytest.approx([4.0, 1.0])
    assert [one.throughput.median for one in found] == pytest.approx([250.0, 1000.0])


def test_spread_is_median_and_the_range_between_the_outer_tenths():
    spread = Spread.of([float(i) for i in range(10, -1, -1)])  # 0 to 10
    assert (spread.low, spread.median, spread.high) == (1.0, 5.0, 9.0)
    assert Spread.of([3.0]).high == 3.0


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    x = torch.ones(1000)  # 4000 bytes
    with torch.inference_mode():
        assert peak_allocated_bytes(lambda: x.neg().neg(), x.device) == 2 * 4000
        assert peak_allocated_bytes(lambda: [x.neg() for _ in range(3)], x.device) == 3 * 4000


def test_the_public_name_is_the_function():
    import hf_compress

    assert hf_compress.measure is measure


class TestErrors:
    def test_too_long(self):
        with pytest.raises(ValueError, match="between 1 and the 64 positions .* got 65"):
            measure(tiny_model("bert"), sequence_length=65)

    def test_pixels_need_examples(self):
        with pytest.raises(ValueError, match="real examples as `inputs`"):
            measure(tiny_model("vit"))

    def test_inputs_without_tokens(self):
        with pytest.raises(ValueError, match="must hold 'input_ids', got \\['text'\\]"):
            measure(tiny_model("bert"), inputs={"text": torch.ones(1)})

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ValueError, match="no config.json"):
            measure(tmp_path)
        with pytest.raises(ValueError, match="is no folder"):
            measure(tmp_path / "missing")

    def test_not_a_model(self):
        with pytest.raises(TypeError, match="got Linear"):
            load_model(nn.Linear(2, 2))

    def test_no_rounds(self):
        with pytest.raises(ValueError, match="rounds must be at least 1"):
            time_interleaved([lambda: None], rounds=0)
        with pytest.raises(ValueError, match="at least one sample"):
            Spread.of([])


def test_a_folder_loads_as_the_class_in_its_config(tmp_path):
    tiny_model("bert", "tokens", num_labels=5).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["architectures"] == [
        type(load_model(tmp_path)).__name__
    ]
