"""What a launch of a kernel leaves behind: nothing that a CUDA graph, another stream or the next call could meet."""

import types

import pytest
import torch
from hf_compress_kernels import wna16_linear, wna16_pack
from hf_compress_kernels.dispatch import INTERPRET

from tests.kernels.oracle import BOUNDS, on, random_layer, relative_error

pytest.importorskip("triton")
from hf_compress_kernels import bsr_launch, fallback, tuning, wna16_launch  # noqa: E402
from hf_compress_kernels.tuning import TileConfig  # noqa: E402
from hf_compress_kernels.wna16_launch import launch_linear  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

SPLIT = TileConfig(8, 64, 4, 2, split_k=4)
MAKERS = ("zeros", "zeros_like", "ones", "full", "tensor", "empty_like", "arange", "rand", "randn", "clone")


@pytest.fixture(autouse=True)
def _forgets():
    fallback._too_large.clear()


def needs_kernels(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("runs under TRITON_INTERPRET=1, see test_interpreter.py")


def case(device, N=192, K=1024, M=5):
    layer = random_layer(4, N, K, 128)
    weight = wna16_pack(*layer[:3], 4, 128, torch.float16)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).half()
    return on(device, (x, weight)), x.double() @ layer.weight(torch.float16).T


def globals_of(module):
    return {name: value for name, value in vars(module).items()
            if isinstance(value, (dict, list, set, torch.Tensor)) and not name.startswith("__")}  # fmt: skip


def test_a_launch_makes_its_result_and_partial_sums_and_nothing_else(device, monkeypatch):
    """No zeros that something has to fill, nothing that stays: a graph replays exactly what the call did."""
    needs_kernels(device)
    (x, weight), expected = case(device)
    made, empty = [], torch.empty

    def counted(*shape, **options):
        made.append(shape)
        return empty(*shape, **options)

    def refused(*args, **options):
        raise AssertionError("a launch allocates something that is not its result")

    first = launch_linear(x, weight, None, config=SPLIT)
    before = {name: value for name, value in globals_of(wna16_launch).items()}
    with monkeypatch.context() as patched:
        patched.setattr(wna16_launch.torch, "empty", counted)
        for maker in MAKERS:
            patched.setattr(wna16_launch.torch, maker, refused)
        patched.setattr(torch.Tensor, "new_zeros", refused)
        again = launch_linear(x, weight, None, config=SPLIT)
    assert made == [(5, 192), (4 * 3 * 8 * 64,)]  # y; splits x tiles x BLOCK_M x BLOCK_N sums
    assert globals_of(wna16_launch) == before == {}
    assert torch.equal(first, again) and relative_error(again, expected) < BOUNDS[torch.float16]


def test_tickets_are_zeros_of_the_weight_before_and_after(device):
    needs_kernels(device)
    (x, weight), _ = case(device)
    others, _ = case(device)
    assert weight.tickets.shape == (2, 24) and weight.tickets.data_ptr() != others[1].tickets.data_ptr()
    for _ in range(3):
        launch_linear(x, weight, None, config=SPLIT)
        assert not weight.tickets.any()


def test_a_product_of_more_tiles_than_tickets_is_not_split(device):
    needs_kernels(device)
    (x, weight), expected = case(device, M=65)
    few = weight._replace(tickets=weight.tickets[:, :2].contiguous())
    for one in (few, weight._replace(tickets=None)):
        y = launch_linear(x, one, None, config=SPLIT)
        assert relative_error(y, expected) < BOUNDS[torch.float16]


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("stream", ["default", "side"])
def test_launches_that_may_run_side_by_side_share_no_ticket(capturing, stream, monkeypatch):
    cuda = types.SimpleNamespace(
        is_current_stream_capturing=lambda: capturing,
        current_stream=lambda device: stream,
        default_stream=lambda device: "default",
    )
    monkeypatch.setattr(wna16_launch.torch, "cuda", cuda)
    weight = types.SimpleNamespace(tickets=torch.zeros(2, 8, dtype=torch.int32).as_subclass(OnGpu))
    found = wna16_launch._tickets(weight)
    place = {("default", False): 0, ("default", True): 1, ("side", True): 1}.get((stream, capturing))
    if place is None:  # a side stream may run beside the default one
        assert found.untyped_storage().data_ptr() != weight.tickets.untyped_storage().data_ptr() and not found.any()
    else:
        assert found.data_ptr() == weight.tickets[place].data_ptr()


@pytest.mark.gpu
def test_a_graph_replays_the_product_beside_eager_calls(device):
    if device.type == "cpu":
        pytest.skip("captures a CUDA graph")
    (x, weight), expected = case(device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        launch_linear(x, weight, None, config=SPLIT)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch_linear(x, weight, None, config=SPLIT)
    for _ in range(20):
        with torch.cuda.stream(side):
            graph.replay()
        eager = launch_linear(x, weight, None, config=SPLIT)
        torch.cuda.synchronize()
        assert torch.equal(y, eager)
    assert relative_error(y, expected) < BOUNDS[torch.float16]


def test_tiles_too_large_for_the_device_are_remembered_by_shape(monkeypatch, caplog):
    tried = []

    def launch(x, weight, bias, config):
        tried.append(config)
        if config.num_stages > 1:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return torch.full((1,), 7.0)

    monkeypatch.setattr(wna16_launch, "_launch", launch)
    (x, weight), _ = case(torch.device("cpu"))
    for _ in range(3):
        assert launch_linear(x, weight, None, config=SPLIT).item() == 7.0
    assert tried == [SPLIT, *tuning.SMALLER, tuning.SMALLER[-1], tuning.SMALLER[-1]]
    assert len(caplog.records) == 2 and "does not fit" in caplog.text
    tried.clear()
    (x, weight), _ = case(torch.device("cpu"), N=128)
    launch_linear(x, weight, None, config=SPLIT)
    assert tried[0] == SPLIT  # another shape is tried by itself


def too_large(*args):
    raise OutOfResources(300_000, 65_536, "shared memory")


def test_a_device_on_which_no_tile_fits_runs_the_reference(monkeypatch, caplog):
    monkeypatch.setattr(wna16_launch, "_launch", too_large)
    (x, weight), expected = case(torch.device("cpu"))
    assert relative_error(launch_linear(x, weight, None), expected) < BOUNDS[torch.float16]
    assert torch.equal(launch_linear(x, weight, None), wna16_linear(x, weight)) or INTERPRET
    assert caplog.text.count("Using the reference, which is slower") == 1


def test_blocks_too_large_for_the_device_are_multiplied_densely(monkeypatch, caplog):
    from tests.kernels.test_bsr import sparse_layer

    weight, dense, _ = sparse_layer((128, 128), N=256, K=256)
    x, grad = torch.randn(3, 256), torch.randn(3, 256)
    monkeypatch.setattr(bsr_launch, "_runs_dense", lambda *args: False)
    monkeypatch.setattr(bsr_launch, "_launch_tiles", too_large)
    monkeypatch.setattr(bsr_launch, "_launch_dw", too_large)
    torch.testing.assert_close(bsr_launch.launch_linear(x, weight, None), x @ dense.T)
    torch.testing.assert_close(bsr_launch.launch_dx(grad, weight), grad @ dense)
    expected = bsr_launch.gather_blocks(grad.t() @ x, weight.crow, weight.col, len(weight.values), (128, 128))
    found = bsr_launch.launch_dw(grad, x, weight.values, weight.crow, weight.col)
    torch.testing.assert_close(found, expected)
    rows = [config for config in tuning.bsr_smaller(TileConfig(64, 128, 4, 3))]
    assert [(c.block_m, c.num_stages) for c in rows] == [(64, 3), (64, 2), (64, 1), (32, 1), (16, 1)]
    assert caplog.text.count("Using the reference") == 3


# Bytes a weight at run time, scales and zero points among them, groups of 128: what the memory of a device has to hold.
MOST_BYTES = {2: 0.33, 3: 0.45, 4: 0.57, 8: 1.07}


@pytest.mark.parametrize("bits", MOST_BYTES, ids="{}-bit".format)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 2048)], ids=str)
def test_bytes_a_weight(bits, shape):
    N, K = shape
    ints = torch.zeros(N, K, dtype=torch.uint8)
    weight = wna16_pack(ints, torch.ones(K // 128, N), torch.zeros(K // 128, N).byte(), bits, 128, torch.float16)
    held = sum(part.numel() * part.element_size() for part in weight if isinstance(part, torch.Tensor))
    assert bits / 8 < held / (N * K) <= MOST_BYTES[bits]
