"""Gates: factors of one on heads or neurons, whose gradient says what the loss would lose with them.

Every example has gates of its own. One backward pass over a batch then gives the gradient of each example's loss, and
the absolute value can be taken before the mean, as Michel et al. 2019 (https://arxiv.org/abs/1905.10650, eq. 2) do.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import has_length

from hf_compress.model.anatomy import in_features
from hf_compress.model.attention import Projection
from hf_compress.model.calibration_data import first_batches
from hf_compress.model.inputs import forward_names
from hf_compress.pruning.importance.tokens import by_example
from hf_compress.training.progress import progress_bar

IGNORED_LABEL = -100


@contextmanager
def gated(
    modules: Sequence[Projection], gates: Sequence[Tensor], shape: tuple[int, ...] | None = None
) -> Iterator[None]:
    """While open, the inputs of `modules[i]` are multiplied by `gates[i]`: (B, H) for H equal parts of the width.

    `shape` (B, T) is that of the batch's text, for layers that work on all its tokens in one row.
    """

    def scale(gate: Tensor):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = by_example(args[0], shape)  # (B, T, H * width)
            if x.dim() != 3 or len(x) != len(gate):
                raise ValueError(
                    f"Gates are for {len(gate)} examples, but a layer works on {tuple(x.shape)}: expected "
                    "(examples, tokens, width). Give padded batches; unpadded ones hide which example a token is of."
                )
            parts = x.unflatten(-1, (gate.shape[1], -1)) * gate[:, None, :, None].to(x.dtype)  # (B, T, H, width)
            return (parts.flatten(-2).view_as(args[0]), *args[1:])

        return hook

    pairs = [(module, gate) for module, gate in zip(modules, gates, strict=True) if gate.shape[1]]
    handles = [module.register_forward_pre_hook(scale(gate)) for module, gate in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_absolute_gradients(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Tensor]],
    modules: Sequence[Projection],
    widths: Sequence[int],
) -> list[Tensor]:
    """For each module (H,): the mean over examples of the absolute gradient of its loss with respect to its gates.

    H is the module's number of inputs over `widths[i]`. Sums are in float64. Raises ValueError for batches without
    labels, or if no example has any.
    """
    sizes = [in_features(module) // width for module, width in zip(modules, widths, strict=True)]
    sums = [torch.zeros(size, dtype=torch.float64, device=model.device) for size in sizes]
    num_examples = 0
    total = len(dataloader) if has_length(dataloader) else None
    for batch in progress_bar(first_batches(dataloader), desc="Scoring", unit="batch", total=total):
        batch = labelled_batch(model, batch)
        shares = loss_shares(model, batch)  # (B,)
        gates = [torch.ones(len(shares), size, device=model.device, requires_grad=True) for size in sizes]
        ids = batch.get("input_ids")
        choices = 1 if ids is None or ids.dim() == 2 else ids.shape[1]  # rows of their own, with one loss
        of_rows = [gate.repeat_interleave(choices, 0) for gate in gates]
        with torch.enable_grad(), gated(modules, of_rows, None if ids is None else ids.flatten(0, -2).shape):
            loss = model(**batch).loss
        used = [i for i, size in enumerate(sizes) if size]
        for i, gradient in zip(used, torch.autograd.grad(loss, [gates[i] for i in used]), strict=True):
            valid = shares > 0
            # the batch's loss is the sum of shares * example's loss; divide to get each example's own
            sums[i] += (gradient[valid].double() / shares[valid, None]).abs().sum(0)
        num_examples += int((shares > 0).sum())
    if not num_examples:
        raise ValueError("The dataloader gave no example with a label: nothing can be said about importance.")
    return [total / num_examples for total in sums]


def padded_rows(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as one tensor, float32; nan where a row has ended."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row.float(), (0, longest - len(row)), value=torch.nan) for row in rows])


def labelled_batch(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `batch` that the model takes, on its device. Raises ValueError if there are no labels."""
    names = forward_names(model) | {"labels"}
    taken = {key: value.to(model.device) for key, value in batch.items() if key in names and isinstance(value, Tensor)}
    if not {"labels", "start_positions"} & taken.keys():
        raise ValueError(f"Importance by gradient needs a loss: each batch must hold labels, got {sorted(batch)}.")
    return taken


def loss_shares(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(B,) What share of the batch's loss, a mean, is each example's own mean loss: by its labels that count."""
    labels = batch.get("labels")
    if labels is None:  # a span: one start, one end, both within the text
        T = batch["input_ids"].shape[1]
        counts = (batch["start_positions"].flatten() < T) & (batch["end_positions"].flatten() < T)
    elif labels.is_floating_point():
        counts = torch.ones(len(labels), device=labels.device)
    else:
        labels = labels[:, 1:] if labels.dim() > 1 and predicts_next_token(model) else labels
        counts = (labels != IGNORED_LABEL).reshape(len(labels), -1).sum(1)
    return counts.double() / counts.sum().clamp(min=1)


def predicts_next_token(model: PreTrainedModel) -> bool:
    """Whether the model's loss compares each token's logits with the label of the token after it."""
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
