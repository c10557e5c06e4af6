"""A teacher inside the student: the same base weights with another adapter, or with none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


class AdapterTeacher(nn.Module):
    """The model of a student with a PEFT adapter, run as a teacher: with `adapter`, or without any.

    One copy of the base weights serves both. The adapter is switched for the teacher's forward alone, which runs in
    eval mode; afterwards active adapter, modes and trainable parameters are as they were.

    Args:
        model: the PEFT model that is trained.
        adapter: the name of the teacher's adapter in it (`model.load_adapter(folder, name)`); None for the bare base.

    Raises ValueError for an adapter that is not there, that is the active one, or that puts tokens before the input
    instead of changing layers.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None):
        super().__init__()
        adapters = getattr(model, "peft_config", None)
        if not hasattr(model, "get_base_model") or adapters is None:
            raise ValueError(
                f"AdapterTeacher needs a PEFT model, got {type(model).__name__}. Make one with peft.get_peft_model, or "
                "pass the teacher itself as teacher_model."
            )
        if adapter is not None and adapter not in adapters:
            raise ValueError(
                f"The model has no adapter {adapter!r}, only {sorted(adapters)}. Load it with "
                f"model.load_adapter(folder, {adapter!r})."
            )
        if any(config.is_prompt_learning for config in adapters.values()):
            raise ValueError("AdapterTeacher switches adapters of layers, such as LoRA; these learn prompts.")
        self.adapter = adapter
        self.model = model
        self._check_active()

    def _check_active(self) -> None:
        if self.adapter in self._active():
            raise ValueError(
                f"The adapter {self.adapter!r} is the one that is trained: the teacher would change while the student "
                f"learns. Activate the student's with model.set_adapter(...), one of {sorted(self.model.peft_config)}."
            )

    def _active(self) -> list[str]:
        return list(self.model.active_adapters)

    def check_student(self, student: nn.Module) -> None:
        """Raise ValueError when `student` is not the model whose adapters are switched."""
        self._check_active()
        if student is not self.get_base_model():
            raise ValueError(
                "AdapterTeacher and the student must be one PEFT model, but the student is another one. Pass the model "
                "that holds both adapters as the student, or pass the teacher itself as teacher_model."
            )

    def get_base_model(self) -> nn.Module:
        return self.model.get_base_model()

    def train(self, mode: bool = True) -> "AdapterTeacher":
        return self  # the modules are the student's: their modes change for a forward only

    def requires_grad_(self, requires_grad: bool = True) -> "AdapterTeacher":
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> "AdapterTeacher":
        return self

    def forward(self, **inputs):
        with self._in_place():
            return self.get_base_model()(**inputs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        active = self._active()
        for module in training:
            module.training = False
        try:
            if self.adapter is None:
                with self.model.disable_adapter():
                    yield
            else:
                self.model.base_model.set_adapter(self.adapter, inference_mode=True)
                yield
        finally:
            self.model.base_model.set_adapter(active)
            self.model.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True
