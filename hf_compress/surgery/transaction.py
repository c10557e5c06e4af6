"""All or nothing: changes are prepared first, then made together, and undone if one of them fails."""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.model.anatomy import is_plain
from hf_compress.model.attention import Projection
from hf_compress.model.record import read_part
from hf_compress.surgery.settle import settle
from hf_compress.surgery.stand_ins import linear_class

MISSING = object()


class Follower(Protocol):
    """What belongs to the weight of a module and is cut with it, such as its quantizer."""

    def select(self, transaction: "Transaction", rows: Sequence[int] | None, columns: Sequence[int] | None) -> None:
        """Keep these output rows and input columns, later: by `transaction.set`."""


class Transaction:
    """Collects changes to the modules of one model; leaving the `with` block without an error makes them.

    An error inside the block, or while the changes are made, leaves the model as it was. `followers` names what is cut
    along with a module.
    """

    def __init__(self, model: nn.Module, followers: "Mapping[nn.Module, Follower] | None" = None):
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"A {type(model).__name__} cannot be cut: its config must say what is left of it. Pass a model of "
                "Transformers; merge adapters first (`merge_and_unload`)."
            )
        if any(read_part(model.config, part) for part in ("bits", "sparsity")):
            raise ValueError("This model is quantized or block-sparse. Cut it first, then quantize or sparsify it.")
        self.model = model
        self.followers = followers or {}
        self.structure: dict[str, Any] = {}  # what the record is to say of the structure; see `settle`
        self._changes: list[tuple[Any, str, Any]] = []  # object, attribute, new value; see `replace`
        self._owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append(name)

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.commit()

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute, a parameter or a child of `owner`, later."""
        self._changes.append((owner, attribute, value))

    def select(
        self,
        module: Projection,
        *,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Keep these output rows and input columns of a linear map, later; of `weight` (N, K) instead if one is given.

        Raises ValueError if the module cannot be cut.
        """
        self.check(module)
        if module in self.followers:
            self.followers[module].select(self, rows, columns)
        bias = None if module.bias is None else module.bias.detach()
        is_transposed = isinstance(module, Conv1D)
        if weight is None:
            weight = module.weight.detach().T if is_transposed else module.weight.detach()
        weight = weight.to(module.weight.dtype)
        if rows is not None:
            index = torch.as_tensor(rows, dtype=torch.long, device=weight.device)
            weight, bias = weight[index], None if bias is None else bias[index]
        if columns is not None:
            weight = weight[:, torch.as_tensor(columns, dtype=torch.long, device=weight.device)]
        out_size, in_size = weight.shape
        self.set(module, "weight", _parameter(weight.T if is_transposed else weight, like=module.weight))
        if rows is not None and bias is not None:
            self.set(module, "bias", _parameter(bias, like=module.bias))
        self.set(module, "__class__", linear_class(module, in_size))
        self.set(module, "nf" if is_transposed else "out_features", out_size)
        self.set(module, "nx" if is_transposed else "in_features", in_size)

    def replace(self, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
        """Put `make(module)` in the place of the module called `name`, later and after all that was said before."""
        self._changes.append((None, name, make))

    def commit(self) -> None:
        """Make the changes, and bring the model's config and record in line with them."""
        undo = []
        config = self.model.config
        saved = copy.deepcopy(config.__dict__)
        try:
            for owner, attribute, value in self._changes:
                if owner is None:
                    owner, _, attribute = attribute.rpartition(".")
                    owner = self.model.get_submodule(owner)
                    value = value(getattr(owner, attribute))
                undo.append((owner, attribute, getattr(owner, attribute, MISSING)))
                setattr(owner, attribute, value)
            settle(self.model, self.structure)
        except BaseException:
            for owner, attribute, value in reversed(undo):
                delattr(owner, attribute) if value is MISSING else setattr(owner, attribute, value)
            config.__dict__.clear()
            config.__dict__.update(saved)
            raise

    def check(self, module: Projection) -> None:
        """Raise ValueError if `module` cannot be cut."""
        names = self._owners.get(id(getattr(module, "weight", None)), [])
        if not is_plain(module):
            raise ValueError(
                f"A {type(module).__name__} cannot be cut, only nn.Linear and Conv1D can. Cut the model before it is "
                "quantized, wrapped or given adapters, or bring it back first (dequantize, merge, unwrap)."
            )
        if len(names) > 1:
            raise ValueError(
                f"One weight is shared by {', '.join(names)}: cutting it in one place would change the others. "
                "Give each its own copy first."
            )


def _parameter(tensor: Tensor, *, like: nn.Parameter) -> nn.Parameter:
    # clone: an index that keeps everything, or a transpose, must not leave a view into the old weight
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)
