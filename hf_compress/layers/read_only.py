"""A dequantized copy of a weight. Writing into it would be lost, so it raises: nothing can change it in silence."""

import torch
from torch import Tensor

MESSAGE = "A packed weight is read-only: call `model.dequantize()` first, then merge or change weights."
WITHOUT_TRACE = ("requires_grad_", "share_memory_", "rename_", "retain_grad")  # change no number
OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or", "xor")}


class ReadOnlyWeight(Tensor):
    """What `weight` of a packed, block-sparse or factorised module gives. Its views are read-only as well.

    All that makes another tensor of it gives an ordinary one. RuntimeError for operations in place, `out=` and `data`.
    """

    _is_hf_initialized = True  # Transformers initialises what no file holds, and asks for it by this name

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [kwargs.get("out")]
        if _is_in_place(getattr(func, "__name__", "")) or kwargs.get("inplace"):
            written += [*args[:1], kwargs.get("tensor"), kwargs.get("input")]
        if any(isinstance(tensor, ReadOnlyWeight) for tensor in written):
            raise RuntimeError(MESSAGE)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            own = {t.untyped_storage().data_ptr() for t in args[:1] if isinstance(t, ReadOnlyWeight)} - {0}  # meta
            if isinstance(result, (tuple, list)):
                return type(result)(_kept(part, own) for part in result)
            return _kept(result, own)

    @property
    def data(self):
        raise RuntimeError(MESSAGE)

    @data.setter
    def data(self, value):
        raise RuntimeError(MESSAGE)


def read_only(weight: Tensor) -> Tensor:
    """`weight` as a `ReadOnlyWeight`; as it is in a traced graph, and where FSDP2 has cut it over ranks."""
    if torch.compiler.is_compiling() or hasattr(weight, "device_mesh"):
        return weight
    weight = weight.as_subclass(ReadOnlyWeight)
    weight._is_hf_initialized = True  # Transformers asks by this name before it fills what no file holds
    return weight


def _is_in_place(name: str) -> bool:
    if name in OPERATORS or name == "__setitem__":
        return True
    return name.endswith("_") and not name.endswith("__") and name not in WITHOUT_TRACE


def _kept(result, own: set[int]):
    """A view of a read-only weight is one as well."""
    is_view = type(result) is Tensor and result.untyped_storage().data_ptr() in own
    return result.as_subclass(ReadOnlyWeight) if is_view else result
