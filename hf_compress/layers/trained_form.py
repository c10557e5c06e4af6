"""What forms of packed layers share whose numbers beside the integers are trained: scales, or the levels of codebooks.

What is computed is what will be stored, in its stored dtype, gradients straight through; the integers stay as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hf_compress.layers.packed_module import Multiplies, as_autocast
from hf_compress.model.classes import made_class
from hf_compress.model.unfinished import FORM


class TrainedForm(nn.Module):
    """The form (see `training.pieces`) of one packed layer, and what is learned for it."""

    column_unit, hears_all, is_idle = 1, True, None
    read: Callable  # stored tensors of a layer -> what is kept of them between passes

    def __init__(self, layer: Multiplies):
        super().__init__()
        self.original_class, self.dtype = type(layer), getattr(layer, layer.KEPT).dtype  # of what is stored

    def forward(self, x: Tensor, kept: Any) -> Tensor:
        """x (M, K) times the weight as it is now; `kept` is what `read` made of the layer."""
        raise NotImplementedError

    def buffers_of(self, layer: Multiplies) -> dict[str, Tensor]:
        """The buffers of `layer` that training changes, as they would be stored."""
        raise NotImplementedError

    def kept_numbers(self) -> Tensor:
        """The scales or levels as they would be stored."""
        raise NotImplementedError

    def weight_of(self, layer: Multiplies) -> Any:
        """What `layer.packed_weight()` is now: it has `dequantize`."""
        raise NotImplementedError

    def as_stored(self, values: Tensor) -> Tensor:
        """`values` rounded to the stored dtype, float32, with their gradient."""
        return values + (values.to(self.dtype).float() - values).detach()

    # What a form does

    def check(self, name: str) -> None:
        if not self.kept_numbers().isfinite().all():
            raise ValueError(
                f"{name}: its trained scales or levels are no numbers of {self.dtype}. Lower learning_rate, or store "
                "float32 (scale_dtype)."
            )

    def select(self, transaction, rows: Sequence[int] | None, columns: Sequence[int] | None) -> None:
        raise ValueError("A packed weight cannot be cut: prune before quantizing, then train the scales.")

    def put_on(self, module: Multiplies) -> None:
        module.__class__ = made_class(f"Trained{self.original_class.__name__}", TrainedLinear, self.original_class)
        vars(module)[FORM] = self  # not a submodule: what is learned belongs to the training
        module.prepare()

    def take_off(self, module: Multiplies) -> None:
        module.__class__ = self.original_class
        del vars(module)[FORM]
        module.prepare()

    def stored(self, module: Multiplies) -> Multiplies:
        for name, tensor in self.buffers_of(module).items():
            setattr(module, name, tensor)
        module.prepare()
        return module


class TrainedLinear:
    """Mixin of a packed layer that is trained: it multiplies by, and saves, what its form is now.

    What its words stand for is kept between passes, a byte for each weight, until they change.
    """

    def prepare(self, *, decodes: bool | None = None) -> None:
        self.decodes = self.decodes if decodes is None else decodes
        self.route, self.run = vars(self)[FORM].read, None

    def packed_weight(self) -> Any:
        return vars(self)[FORM].weight_of(self)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = as_autocast(x)
        y = vars(self)[FORM](self.rounded(x.reshape(-1, self.in_columns)), self._current())
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in vars(self)[FORM].buffers_of(self).items()})
