"""GPTQ against the naive loop of its paper, in float64."""

import pytest
import torch

from hf_compress.engines.ops import gptq_quantize_block
from hf_compress.quantization import gptq
from hf_compress.quantization.gptq import (
    descend,
    inverse_cholesky,
    output_error,
    quantize_run,
    quantize_weight,
    refit_scales,
)


def problem(N=24, K=64, samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator, dtype=torch.float64)
    mixing = torch.randn(K, K, generator=generator, dtype=torch.float64)
    X = mixing @ torch.randn(K, samples, generator=generator, dtype=torch.float64)
    X = X * torch.logspace(0, 1, K, dtype=torch.float64)[torch.randperm(K, generator=generator)][:, None]
    return W, 2 * X @ X.T / samples


def naive_gptq(W, H, bits, group_size, *, desc_act=False, static_groups=False, damp=0.01):
    """One column at a time, the whole rest updated at once; min-max ranges, asymmetric, written from the paper."""
    N, K = W.shape
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if desc_act else torch.arange(K)
    Hd = H + damp * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(Hd[order][:, order]), upper=True)
    original, W = W, W[:, order].clone()
    q = torch.zeros(N, K)
    grids = {}
    for j in range(K):
        group = int(order[j]) // group_size if static_groups else j // group_size
        if group not in grids:
            columns = original[:, group * group_size : (group + 1) * group_size] if static_groups else (
                W[:, j : j + group_size])  # fmt: skip
            low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            grids[group] = scale, (-low / scale).round().clamp(0, 2**bits - 1)
        scale, zero = grids[group]
        q[:, order[j]] = (W[:, j] / scale + zero).round().clamp(0, 2**bits - 1).float()
        error = (W[:, j] - scale * (q[:, order[j]] - zero)) / U[j, j]
        W[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
    return q, grids


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)
@pytest.mark.parametrize("update_block_size", [64, 24, 1], ids=["no-lazy-updates", "lazy", "each-column"])
@pytest.mark.parametrize("order", ["in-order", "act-order", "static-groups"])
def test_quantize_weight_gives_the_integers_of_the_paper(bits, update_block_size, order):
    W, H = problem()
    options = dict(desc_act=order != "in-order", static_groups=order == "static-groups")
    result = quantize_weight(W, H, bits, group_size=16, range_method="minmax", update_block_size=update_block_size,
                             scale_dtype=torch.float64, **options)  # fmt: skip
    expected, grids = naive_gptq(W, H, bits, 16, **options)
    assert torch.equal(result.q.float(), expected)
    for group, (scale, zero) in grids.items():
        torch.testing.assert_close(result.scales[group], scale)
        assert torch.equal(result.zero_points[group].double(), zero)


def test_a_run_of_columns_is_what_the_kernel_makes_of_it():
    W, H = problem()
    W, U = W.float(), inverse_cholesky(H, 0.01, name="weight", num_samples=None)[16:32, 16:32].float()
    run = W[:, 16:32].t().contiguous()
    scales, zeros = torch.full((1, 24), 0.4), torch.arange(24.0)[None] % 16
    q, errors = quantize_run(run, U, scales, zeros, 4)
    expected_q, expected_errors = gptq_quantize_block(W[:, 16:32], U, scales.t(), zeros.t(), 15)
    assert torch.equal(q.t(), expected_q.float()) and torch.equal(run, W[:, 16:32].t()), "what is given stays"
    torch.testing.assert_close(errors.t(), expected_errors)


class OnGPU:
    """What says where and how large a tensor is, where there is no GPU."""

    device = torch.device("cuda")

    def __init__(self, rows, dtype=torch.float32):
        self.rows, self.dtype = rows, dtype

    def __len__(self):
        return self.rows


def test_the_kernel_is_asked_for_what_it_takes_alone(monkeypatch):
    monkeypatch.setattr(gptq, "HAS_TRITON", True)
    assert gptq.kernel_takes(OnGPU(16), OnGPU(1))
    assert not gptq.kernel_takes(OnGPU(16, torch.float64), OnGPU(1)), "float64 stays float64"
    assert not gptq.kernel_takes(OnGPU(15), OnGPU(1)) and not gptq.kernel_takes(OnGPU(16), OnGPU(16))
    assert not gptq.kernel_takes(torch.empty(16, 24), torch.empty(1, 24))
    monkeypatch.setattr(gptq, "HAS_TRITON", False)  # PyTorch quantizes on that GPU as well
    assert not gptq.kernel_takes(OnGPU(16), OnGPU(1))


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, 64, 128], ids="groups-of-{}".format)
def test_a_gpu_makes_the_integers_of_the_cpu(group_size):
    W, H = problem(K=128)
    options = dict(group_size=group_size, scale_dtype=torch.float32)
    cpu = quantize_weight(W.float(), H.float(), 4, **options)
    gpu = quantize_weight(W.float().cuda(), H.float().cuda(), 4, **options)
    assert (gpu.q.cpu() != cpu.q).float().mean() < 0.01  # ties, and sums in another order


def test_float32_differs_only_in_ties():
    W, H = problem()
    exact = quantize_weight(W, H, 4, group_size=16, scale_dtype=torch.float64)
    single = quantize_weight(W.float(), H.float(), 4, group_size=16, scale_dtype=torch.float32)
    assert (exact.q != single.q).float().mean() < 0.01
    assert output_error(W, single.dequantize().double(), H) == pytest.approx(
        output_error(W, exact.dequantize(torch.float64), H), rel=0.01
    )


def test_the_sum_of_column_errors_is_the_output_error():
    """The identity that makes 1 / U_jj^2 the weight of a column."""
    W, H = problem(samples=500)
    U = inverse_cholesky(H, 0.0)
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H))
    result = quantize_weight(W, H, 3, group_size=16, damp_percent=0.0, update_block_size=1, scale_dtype=torch.float64)
    Q = result.dequantize(torch.float64)
    e = (W - Q) @ torch.linalg.inv(U)  # W - Q = e U, e_j = (w_j - q_j) / U_jj at the time column j is rounded
    torch.testing.assert_close((e**2).sum(), (((W - Q) @ H) * (W - Q)).sum())
    assert ((e * U.diagonal()).abs() <= result.scales.max() / 2 + 1e-9).float().mean() > 0.9  # the rest is clipped


def test_gptq_beats_rounding_and_refinement_beats_gptq():
    W, H = problem(samples=400)
    common = dict(group_size=16, scale_dtype=torch.float64)
    rounded = quantize_weight(W, torch.eye(64, dtype=torch.float64), 3, **common)
    gptq = quantize_weight(W, H, 3, **common)
    refined = quantize_weight(W, H, 3, refinements=2, **common)
    errors = [output_error(W, r.dequantize(torch.float64), H) for r in (rounded, gptq, refined)]
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.02 * errors[2]


def test_refit_scales_solves_least_squares():
    W, H = problem(N=3, K=8)
    g_idx = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    q = torch.randint(0, 8, (3, 8), generator=torch.Generator().manual_seed(0)).double()
    zeros = torch.full((2, 3), 3.0, dtype=torch.float64)
    new = refit_scales(W, H, q, torch.full((2, 3), 1e-9, dtype=torch.float64), zeros, g_idx)
    root = torch.linalg.cholesky(H).T
    for row in range(3):
        columns = torch.stack([(q[row] - 3) * (g_idx == g) for g in range(2)], 1)  # (K, G)
        solution = torch.linalg.lstsq(root @ columns, (root @ W[row])[:, None]).solution[:, 0]
        expected = solution if (solution > 1e-10).all() else torch.full((2,), 1e-9, dtype=torch.float64)
        torch.testing.assert_close(new[:, row], expected, rtol=1e-4, atol=1e-12)


def test_descend_never_raises_the_error_and_ends_in_a_minimum():
    W, H = problem(N=6, K=12)
    g_idx = torch.arange(12) // 4
    scales, zeros = torch.full((3, 6), 0.7, dtype=torch.float64), torch.full((3, 6), 4.0, dtype=torch.float64)

    def error(q):
        E = scales[g_idx].T * (q - 4) - W
        return ((E @ H) * E).sum(1)

    q = torch.randint(0, 8, (6, 12)).double()
    for _ in range(30):
        after = descend(W, H, q, scales, zeros, g_idx, 3, update_block_size=5)
        assert (error(after) <= error(q) + 1e-9).all()
        q = after
    for column in range(12):
        for step in (-1, 1):
            other = q.clone()
            other[:, column] = (other[:, column] + step).clamp(0, 7)
            assert (error(other) >= error(q) - 1e-9).all()


def test_columns_without_input_are_rounded_to_nearest():
    W, H = problem()
    H[5] = H[:, 5] = 0
    result = quantize_weight(W, H, 8, group_size=64, range_method="minmax", scale_dtype=torch.float64)
    assert (result.dequantize(torch.float64)[:, 5] - W[:, 5]).abs().max() <= result.scales.max() / 2 + 1e-9


def test_a_singular_hessian_is_damped_and_named(caplog):
    K = 16
    x = torch.ones(K, 1, dtype=torch.float64)
    H = 2 * x @ x.T - 0.5 * torch.eye(K, dtype=torch.float64)  # what rounding errors make of a singular Hessian
    quantize_weight(torch.randn(4, K), H, 4, name="layers.3.mlp", num_samples=1)
    assert "layers.3.mlp (1 calibration samples) is singular" in caplog.text
    with pytest.raises(ValueError, match="layers.3.mlp .* stays singular"):
        quantize_weight(torch.randn(4, K), torch.zeros(K, K), 4, name="layers.3.mlp")


def test_bad_input_is_refused():
    W, H = problem()
    with pytest.raises(ValueError, match="down_proj holds NaN"):
        quantize_weight(W / 0 * 0, H, 4, name="down_proj")
    with pytest.raises(ValueError, match="inputs of down_proj were NaN"):
        quantize_weight(W, H * torch.nan, 4, name="down_proj")
    with pytest.raises(ValueError, match="Hessian"):
        quantize_weight(W, H[:10, :10], 4)
    with pytest.raises(ValueError, match="group_size must divide"):
        quantize_weight(W, H, 4, group_size=48)
