"""What packed layers share: the tensors that are stored, and the one callable that multiplies by them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engines.opaque import opaque_product, register
from hf_compress.engines.packed_weight import PackedWeight, Stored
from hf_compress.engines.routes import FewAndMany, Run, choose
from hf_compress.layers.read_only import read_only
from hf_compress.layers.scheme import WeightScheme
from hf_compress.layers.sentinel import awaited

DTYPES = torch.float32, torch.bfloat16, torch.float16  # of the inputs that a run takes


class PackedModule:
    """Scales keep their dtype when the model is cast, `weight` is a read-only copy, and nothing else is saved."""

    KEPT = "scales"  # the buffer that keeps its dtype

    is_loading = False  # True from the time the empty module is made until its tensors are there, and checked
    scheme: WeightScheme
    compute_dtype: torch.dtype  # of `weight`; follows `model.to(dtype)`

    @property
    def weight(self) -> Tensor:
        return awaited(self) if self.is_loading else read_only(self.dequantize())

    def _apply(self, fn, recurse: bool = True):
        before = getattr(self, self.KEPT)
        super()._apply(fn, recurse)
        after = getattr(self, self.KEPT)
        if after.dtype != before.dtype:
            setattr(self, self.KEPT, before.to(after.device))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=after.device)).dtype
        self.prepare()
        return self

    def prepare(self, *, decodes: bool | None = None) -> None:
        """Called when the stored tensors are there, or have moved. `decodes` says whether the model generates."""
        raise NotImplementedError


class Multiplies(PackedModule):
    """A packed weight (N, K) that is multiplied by: `route` makes `run`, which does it.

    What is stored may be replaced or changed in place: the next call makes the run anew. (A change in place of an
    inference tensor leaves no trace.)
    """

    decodes = False  # True in models that generate: no second copy of the weight
    route = None  # makes the run; None: the weight is dequantized in each call
    run = None  # made by the first call in need of it: what is only saved never pays
    rounds = False  # whether the record asks for inputs of 8 bits
    _made_of = ()  # the stored tensors, or None, that it was made of, each with its version

    def stored(self) -> Stored:
        raise NotImplementedError

    def packed_weight(self) -> PackedWeight:
        """The numbers that the stored tensors stand for."""
        return self.stored().weight()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (N, K), computed in float32 and then cast to `dtype`, by default the model's."""
        return self.packed_weight().dequantize(dtype or self.compute_dtype)

    def prepare(self, *, decodes: bool | None = None) -> None:
        """Choose the route from what the weight is and the processor can do; shapes only, nothing is multiplied."""
        if decodes is not None:
            self.decodes = decodes
        self.route = self.run = None
        stored = self.stored()
        if stored.words.device.type == "cpu":
            self.route = self._choose(stored)
            register(self, stored.words)

    def _choose(self, stored: Stored):
        return choose(stored, decodes=self.decodes, rounds=self.rounds, activation_range=self.scheme.activation_range)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) times the weight: (..., N), differentiable in x and bias."""
        is_compiling = torch.compiler.is_compiling()
        x = as_autocast(x)
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_columns)
        if self.route is None or x.dtype not in DTYPES or not rows.shape[0]:
            y = F.linear(self.rounded(rows), self.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
        elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            y = self._differentiable(self.rounded(rows), bias)
        elif is_compiling:
            y = self._traced(rows, bias)
        else:
            y = self.infer(rows, bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def rounded(self, x: Tensor) -> Tensor:
        """The inputs as the record wants them, straight-through in gradients."""
        return x

    def infer(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """rows (M, K) -> (M, N), outside of autograd and compilation."""
        run = self._current()
        return without_autocast(run, rows if run.rounds or not self.rounds else self.rounded(rows), bias)

    def _differentiable(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():  # the plain path, which the compiler differentiates
            return F.linear(rows, self.dequantize(rows.dtype), None if bias is None else bias.to(rows.dtype))
        return _FrozenWeight.apply(rows, bias, self)

    def _traced(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        self._is_made()
        run = self.run.pick(rows.shape[0]) if isinstance(self.run, FewAndMany) else self.run
        if run.traceable:
            return run(rows if run.rounds else self.rounded(rows), bias)
        stored = self.stored()
        return opaque_product(rows, bias, stored.words, stored.out_features)

    def _is_made(self) -> bool:
        return self._current() is not None

    # what torch.compiler.assume_constant_result does, which imports the compiler and its second of modules
    _is_made._dynamo_marked_constant = True

    def _current(self):
        if self.run is not None:
            buffers = self._buffers
            for name, tensor, version in self._made_of:
                if buffers[name] is not tensor or (version >= 0 and tensor._version != version):
                    break
            else:
                return self.run
        with torch.inference_mode(False), torch.no_grad():
            run = self.route(self.stored())
        self.run = run
        self._note_buffers()
        return run

    def _note_buffers(self) -> None:
        self._made_of = tuple(
            (name, tensor, -1 if tensor is None else _version(tensor)) for name, tensor in self._buffers.items()
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "run": None, "route": None, "_made_of": ()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.prepare()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for, as `nn.Linear` takes it."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def without_autocast(run: Run, rows: Tensor, bias: Tensor | None) -> Tensor:
    """run(rows, bias) in the dtypes that it chooses itself: the rows already are what autocast asks for."""
    if not torch.is_autocast_enabled(rows.device.type):
        return run(rows, bias)
    with torch.autocast(rows.device.type, enabled=False):
        return run(rows, bias)


class _FrozenWeight(torch.autograd.Function):
    """The product of inference; its gradients dequantize the weight, which is not kept for them."""

    @staticmethod
    def forward(ctx, rows: Tensor, bias: Tensor | None, module: Multiplies) -> Tensor:
        ctx.module, ctx.bias_dtype = module, None if bias is None else bias.dtype
        return without_autocast(module._current(), rows, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad @ ctx.module.dequantize(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


def routes_of(model: nn.Module) -> dict[str, int]:
    """How many packed layers of `model` each route runs; what was not called yet counts under "not run yet"."""
    names: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, Multiplies) and hasattr(module, "in_features"):
            name = "dequantized in each call" if module.route is None else getattr(module.run, "name", "not run yet")
            names[name] = names.get(name, 0) + 1
    return names
