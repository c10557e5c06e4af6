"""x W^T + bias for a packed W on the CPU: the table names the engine, which is made once and found by its tensors."""

import logging
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_compress.engines import processor
from hf_compress.engines.bodies import BODIES, Int4, Int8Weights
from hf_compress.engines.integers import Stored, dequantize, integers
from hf_compress.engines.kept import kept_for
from hf_compress.engines.ops import unpack_zeros

logger = logging.getLogger(__name__)

Body = Callable[[Tensor, Tensor | None], Tensor]
IN_GRAPH = Int4, Int8Weights  # made of ATen's operators and plain tensors
ONCE = {"bfloat16_once": torch.bfloat16, "float32_once": torch.float32}  # engines that keep nothing
FEW_TOKENS = 16  # at most, of a decoding step whose graph holds the engine itself
ROWS_AT_ONCE = 2048  # output features dequantized together, to bound memory

if hasattr(os, "register_at_fork"):
    # OpenMP's threads do not survive a fork: the first parallel region of a forked worker would wait for them for ever
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def packed_linear(x: Tensor, bias: Tensor | None, stored: Stored, route: str) -> Tensor:
    """x (..., K) in float32 or bfloat16 times the packed weight: (..., N), same dtype, differentiable in x and bias.

    route  "auto"      the fastest engine of the table
           "one_copy"  the same, without a second copy of the weight where that can be avoided, for models that decode
           "exact"     float32 arithmetic
           "int8"      products of 8-bit integers, each token rounded to its own grid
    """
    rows = x if x.ndim == 2 else x.reshape(-1, stored.in_features)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        y = torch.ops.hf_compress.packed_linear(rows, bias, *stored, route)
    else:  # the operator's dispatch costs as much as a small product
        y = _multiply(rows, bias, stored, route)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], stored.out_features)


def _multiply(x: Tensor, bias: Tensor | None, stored: Stored, route: str) -> Tensor:
    if not len(x):
        return x.new_empty(0, stored.out_features)
    engine = find_engine(stored, route, len(x), x.dtype, kept_for(stored[:4]))
    if isinstance(engine, torch.dtype):
        return _once(x, bias, stored, engine)
    return engine(x, bias)


def find_engine(stored: Stored, route: str, tokens: int, dtype: torch.dtype, made: dict) -> Body | torch.dtype:
    """The first engine of the table that can be made, or the dtype to dequantize to in each call.

    `made` is what `kept_for` gives. The engine must hold none of the stored tensors: they would keep themselves alive.
    """
    key = (route, tokens, dtype)
    if key not in made:
        made[key] = _first_of_table(stored, *key, made)
    return made[key]


def engine_in_graph(stored: Stored, route: str, dtype: torch.dtype) -> Body | None:
    """The engine for few tokens, if it is made of operators that a compiled graph can hold as they are.

    Our own operator goes through Python in every call, which costs as much as a small product. A graph reads the
    engine's tensors where the layer keeps them, so the layer drops the engine when its stored tensors change.
    """
    made = kept_for(stored[:4])
    engines = [find_engine(stored, route, tokens, dtype, made) for tokens in (1, FEW_TOKENS)]
    return engines[0] if engines[0] is engines[1] and isinstance(engines[0], IN_GRAPH) else None


def _first_of_table(stored: Stored, route: str, tokens: int, dtype: torch.dtype, made: dict) -> Body | torch.dtype:
    for name in _names(stored, route, tokens, dtype):
        if name in ONCE:
            return ONCE[name]
        if name not in made:
            made[name] = _make(name, stored)
        if made[name] is not None:
            return made[name]
    return torch.float32


def _names(stored: Stored, route: str, tokens: int, dtype: torch.dtype) -> tuple[str, ...]:
    if route == "exact":
        return ("float32",)
    if route == "int8":
        return ("int8_products",)
    eight = "eight_rows" if stored.num_groups == 1 else "eight"
    kind = "low" if stored.bits < 8 else eight
    if route == "one_copy":
        kind += "_one_copy"
    return processor.candidates(kind, tokens, stored.out_features * stored.in_features, dtype)


def _make(name: str, stored: Stored) -> Body | None:
    with torch.inference_mode(False), torch.no_grad():
        try:
            return BODIES[name](integers(stored))
        except (ValueError, ImportError, RuntimeError, AttributeError) as error:  # a shape, or a library without it
            logger.info("A packed layer does not use the engine %r: %s", name, error)
            return None


def _once(x: Tensor, bias: Tensor | None, stored: Stored, dtype: torch.dtype) -> Tensor:
    """The weight dequantized in `dtype`, for this call only. Error in bfloat16 at most 8e-3."""
    y = x.new_empty(len(x), stored.out_features)
    rows = x.to(dtype)
    for n, part in _slices(stored, dtype):
        y[:, n] = rows @ part
    return y if bias is None else y.add_(bias)


def _slices(stored: Stored, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """W[n]^T (K, n) in `dtype`, slice by slice."""
    bits, N, K, G = stored.bits, stored.out_features, stored.in_features, stored.num_groups
    whole = not stored.by_rows and stored.g_idx is None and 32 % bits == 0 and K * bits % 32 == 0  # words
    if not whole and not stored.by_rows:
        yield slice(0, N), dequantize(stored, dtype).t()
        return
    for start in range(0, N, ROWS_AT_ONCE):
        n = slice(start, min(start + ROWS_AT_ONCE, N))
        if stored.by_rows:
            zeros = None if stored.zeros is None else stored.zeros[n]
            part = Stored(stored.qweight[n], stored.scales[n], zeros, None, bits, n.stop - start, K, True)
            yield n, dequantize(part, dtype).t()
            continue
        words = stored.qweight[:, n]
        q = words.new_empty(len(words), 32 // bits, words.shape[1])
        for place in range(32 // bits):
            torch.bitwise_right_shift(words, place * bits, out=q[:, place])
        q = q.bitwise_and_(2**bits - 1).flatten(0, 1).to(dtype)  # (K, n)
        zeros = 2 ** (bits - 1)
        if stored.zeros is not None:
            zeros = unpack_zeros(stored.zeros, bits, N)[:, None, n].to(dtype)  # (G, 1, n)
        scales = stored.scales[:, None, n].to(dtype)
        yield n, q.unflatten(0, (G, -1)).sub_(zeros).mul_(scales).flatten(0, 1)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:6])
    ctx.sizes, ctx.bias_dtype = inputs[6:-1], None if inputs[1] is None else inputs[1].dtype


def _backward(ctx, grad: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(Stored(*ctx.saved_tensors, *ctx.sizes), grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
    return (grad_x, grad_bias, *[None] * 9)


torch.library.define(
    "hf_compress::packed_linear",
    "(Tensor x, Tensor? bias, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? g_idx, int bits, int out_features, "
    "int in_features, bool by_rows, str route) -> Tensor",
)
torch.library.impl(
    "hf_compress::packed_linear",
    "cpu",
    lambda x, bias, *stored_and_route: _multiply(x, bias, Stored(*stored_and_route[:-1]), stored_and_route[-1]),
)
torch.library.register_fake(
    "hf_compress::packed_linear", lambda x, bias, *stored_and_route: x.new_empty(x.shape[0], stored_and_route[5])
)
torch.library.register_autograd("hf_compress::packed_linear", _backward, setup_context=_save_for_backward)
