"""A dequantized copy of a weight. Writing into it would be lost, so it raises: nothing can change it in silence."""

import torch
from torch import Tensor

PACKED = "A packed weight is read-only: call `model.dequantize()` first, then merge or change weights."
WITHOUT_TRACE = ("requires_grad_", "share_memory_", "rename_", "retain_grad")  # change no number
OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or", "xor")}


class ReadOnlyWeight(Tensor):
    """What `weight` of a packed, block-sparse or factorised module gives. Its views are read-only as well.

    All that makes another tensor of it gives an ordinary one. RuntimeError for operations in place, `out=` and `data`.
    """

    _is_hf_initialized = True  # Transformers initialises what no file holds, and asks for it by this name
    why = PACKED  # what is told to those that write

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [kwargs.get("out")]
        if _is_in_place(getattr(func, "__name__", "")) or kwargs.get("inplace"):
            written += [*args[:1], kwargs.get("tensor"), kwargs.get("input")]
        for tensor in written:
            if isinstance(tensor, ReadOnlyWeight):
                raise RuntimeError(tensor.why)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            own = {t.untyped_storage().data_ptr(): t.why for t in args[:1] if isinstance(t, ReadOnlyWeight)}
            own.pop(0, None)  # meta
            if isinstance(result, (tuple, list)):
                return type(result)(_kept(part, own) for part in result)
            return _kept(result, own)

    @property
    def data(self):
        raise RuntimeError(self.why)

    @data.setter
    def data(self, value):
        raise RuntimeError(self.why)


def read_only(weight: Tensor, why: str = PACKED) -> Tensor:
    """`weight` as a `ReadOnlyWeight`, with what is told to those who write into it.

    As it is in a traced graph, and where FSDP2 has cut it over ranks.
    """
    if torch.compiler.is_compiling() or hasattr(weight, "device_mesh"):
        return weight
    weight = weight.as_subclass(ReadOnlyWeight)
    weight.why = why
    weight._is_hf_initialized = True  # Transformers asks by this name before it fills what no file holds
    return weight


def _is_in_place(name: str) -> bool:
    if name in OPERATORS or name == "__setitem__":
        return True
    return name.endswith("_") and not name.endswith("__") and name not in WITHOUT_TRACE


def _kept(result, own: dict[int, str]):
    """A view of a read-only weight is one as well."""
    why = own.get(result.untyped_storage().data_ptr()) if type(result) is Tensor else None
    if why is not None:
        result = result.as_subclass(ReadOnlyWeight)
        result.why = why
    return result
