"""Runs a language model with its output head on chosen positions only, and keeps what the head would have read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import plain_model


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits of hidden states. Raises ValueError for a model that has none."""
    head = anatomy(plain_model(model)).head
    if head is None:
        raise ValueError(
            f"{type(plain_model(model)).__name__} has no output embeddings: expected a language model, for example one "
            "loaded with AutoModelForMaskedLM or AutoModelForCausalLM."
        )
    return head


@contextmanager
def head_only_on(model: nn.Module, choose: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """While open, the head runs on `choose(states)` instead of all states (B, T, D), which are put into the list.

    The logits of such a forward have the leading shape of what was chosen.
    """
    seen: list[Tensor] = []

    def narrow(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen[:] = args[:1]
        return (choose(args[0]),)

    handle = output_head(model).register_forward_pre_hook(narrow)
    try:
        yield seen
    finally:
        handle.remove()
