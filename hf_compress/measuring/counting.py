"""What a model holds and what it computes, counted: weights, zeros, multiply-adds.

A count is of what is stored. A zero that is stored is a weight like any other: a masked model is no smaller.
"""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_compress.layers.low_rank import LowRank

aten = torch.ops.aten
MATMULS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1, aten.mv: 0, aten.addmv: 1}  # op -> left factor


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `module` itself, not of its children."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _is_linear_map(module: nn.Module) -> bool:
    is_linear = isinstance(module, (nn.Linear, Conv1D)) or "crow_indices" in _tensors(module)
    return is_linear and not any(isinstance(child, (nn.Linear, Conv1D)) for child in module.children())


def _is_packed(module: nn.Module) -> bool:
    """A linear map or embedding that keeps its weights as something else than one tensor `weight`."""
    factors = [p for p in module.parameters(recurse=False) if p.dim() == 2]  # of a low rank: ordinary parameters
    return (
        (_is_linear_map(module) or isinstance(module, nn.Embedding))
        and not factors
        and "weight" not in _tensors(module)
    )


def _stores_weights(module: nn.Module) -> bool:
    """False for a head that borrows the table of the embedding it is tied to."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return any(name != "bias" for name, _ in tensors)


def num_weights(module: nn.Module) -> int:
    """Weights that one linear map or embedding works with, without its bias: packed ones count once each, dropped
    blocks do not."""
    own = _tensors(module)
    if "weight" in own:
        return own["weight"].numel()
    if "crow_indices" in own:  # block compressed sparse row: only the stored blocks
        return own["values"].numel()
    if isinstance(module, LowRank):  # where several share a projection, each multiplies by it
        return module.table.numel() + module.projection.numel()
    factors = [tensor for tensor in own.values() if tensor.dim() == 2]
    if factors and "qweight" not in own:  # a product of several matrices
        return sum(factor.numel() for factor in factors)
    if isinstance(module, nn.Embedding):
        return module.num_embeddings * module.embedding_dim
    return module.in_features * module.out_features


def num_parameters(model: nn.Module) -> int:
    """All weights and biases; shared tensors count once, packed weights count as the values they stand for.

    `model.num_parameters()` leaves packed weights out, since they are buffers.
    """
    packed = {module for module in model.modules() if _is_packed(module) and _stores_weights(module)}
    inside = {id(p) for module in packed for name, p in module.named_parameters() if name != "bias"}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return plain + sum(num_weights(module) for module in packed)


def sparsity(model: nn.Module) -> dict[str, float]:
    """Share of zeros among the weights of the linear maps, 0 to 1, by kind.

    `weights`: exact zeros that are stored. `rows`, `columns`: outputs, inputs of a linear map whose weights are all
    zero, as a share of all outputs, inputs. `dropped_blocks`: weights of block-sparse layers that are not stored, as a
    share of those that the dense layers would hold. Other packed weights are not looked into.
    """
    totals, zeros = Counter(), Counter()
    for module in filter(_is_linear_map, model.modules()):
        own = _tensors(module)
        if "crow_indices" in own:
            dense = module.in_features * module.out_features
            totals["dropped_blocks"] += dense
            zeros["dropped_blocks"] += dense - num_weights(module)
        if "weight" not in own:
            continue
        zero = own["weight"] == 0  # (N, K)
        zero = zero.mT if isinstance(module, Conv1D) else zero
        for kind, is_zero in {"weights": zero, "rows": zero.all(1), "columns": zero.all(0)}.items():
            totals[kind] += is_zero.numel()
            zeros[kind] += int(is_zero.sum())
    return {kind: zeros[kind] / total for kind, total in totals.items() if total}  # all neurons may be gone


class _MatmulCounter(TorchDispatchMode):
    """Multiply-adds of every matrix product that is not inside a linear map, while open."""

    def __init__(self):
        super().__init__()
        self.multiply_adds, self.linear_depth = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.linear_depth == 0:
            self.multiply_adds += _multiply_adds(func, args, out)
        return out


def _multiply_adds(func: torch._ops.OpOverload, args: tuple, out: object) -> int:
    packet = func.overloadpacket
    if packet in MATMULS:
        return out.numel() * args[MATMULS[packet]].shape[-1]
    if "scaled_dot_product" in packet.__name__ or "flash_attention" in packet.__name__:
        query, key, value = args[:3]  # (..., Tq, Dh), (..., Tk, Dh), (..., Tk, Dv); a causal mask saves nothing here
        return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if packet is aten.convolution:
        return out.numel() * math.prod(args[1].shape[1:])
    return 0


@contextmanager
def _count_linears(model: nn.Module, counter: _MatmulCounter):
    """Count each linear map by its weights and rows: whatever runs inside (a packed kernel) is not looked at."""

    def enter(module: nn.Module, args: tuple) -> None:
        counter.linear_depth += 1

    def leave(module: nn.Module, args: tuple, out: Tensor) -> None:
        counter.linear_depth -= 1
        counter.multiply_adds += out.shape[:-1].numel() * num_weights(module)

    linears = [module for module in model.modules() if _is_linear_map(module)]
    handles = [module.register_forward_pre_hook(enter) for module in linears]
    handles += [module.register_forward_hook(leave) for module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def multiply_adds(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Multiply-adds of one forward of `batch`, per example, padding included.

    Counted: linear maps (packed ones too, as the products they stand for; of block-sparse ones the stored blocks), both
    products of attention, matrix products and convolutions elsewhere. Not counted: additions, norms, look-ups, softmax.
    """
    counter = _MatmulCounter()
    with _count_linears(model, counter), counter:
        model(**batch)
    return counter.multiply_adds // len(next(iter(batch.values())))
