"""How much each feed-forward neuron matters: by the gradient of its gate, its activations, or its weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import Anatomy, FeedForward, anatomy, in_features, matrix
from hf_compress.model.calibration_data import first_batches
from hf_compress.model.cuttable import cuttable
from hf_compress.model.inputs import forward_arguments
from hf_compress.model.unfinished import check_loaded
from hf_compress.pruning.importance.gates import mean_absolute_gradients, padded_rows
from hf_compress.pruning.importance.tokens import decoder_layers, real_tokens

METHODS = ("gradient", "entropy", "output_norm", "input_norm")


def neuron_importance(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    method: Literal["gradient", "entropy", "output_norm", "input_norm"] = "gradient",
) -> Tensor:
    """Importance of every neuron, (L, F): row i belongs to `anatomy(model).layers[i]`, nan where it has fewer neurons.

    gradient     mean over examples of |d loss / d gate| (Prasanna et al. 2020, https://arxiv.org/abs/2005.00561);
                 needs labels in the batches
    entropy      in bits, of whether a token activates the neuron, that is, makes its output positive
    output_norm  mean absolute outgoing weight
    input_norm   mean absolute incoming weight, of gate and value together where there is a gate
                 (the last three: He et al. 2014, https://doi.org/10.1109/ICASSP.2014.6853595)

    The norms need no dataloader. The model runs in eval mode and is left as it was.
    Raises ValueError for an unknown method, or for data that is missing or empty.
    """
    check_loaded(model, "neuron_importance")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    found = anatomy(model) if method == "entropy" else cuttable(model)
    parts = [layer.feed_forward for layer in found.layers]
    if method == "output_norm":
        return padded_rows([matrix(part.output).detach().abs().mean(0) for part in parts])
    if method == "input_norm":
        return padded_rows([incoming_weights(part).abs().mean(1) for part in parts])
    if dataloader is None:
        raise ValueError(f"method={method!r} needs a dataloader; 'output_norm' and 'input_norm' do without.")
    with evaluating([model]):
        if method == "gradient":
            return padded_rows(mean_absolute_gradients(model, dataloader, [p.output for p in parts], [1] * len(parts)))
        return padded_rows([_entropy(share) for share in _active_shares(model, dataloader, found)])


def incoming_weights(part: FeedForward) -> Tensor:
    """(F, D), or (F, 2 * D) with gate and value side by side."""
    weights = [matrix(module).detach() for module in part.inputs]
    if part.is_fused:
        weights = list(weights[0].chunk(2))
    return torch.cat(weights, dim=1)


def _entropy(share: Tensor) -> Tensor:
    """Bits: -p log2 p - (1 - p) log2 (1 - p)."""
    both = torch.stack([share, 1 - share])
    return -torch.special.xlogy(both, both).sum(0) / torch.log(torch.tensor(2.0, dtype=share.dtype))


@torch.no_grad()
def _active_shares(model: PreTrainedModel, dataloader: Iterable[Mapping[str, Tensor]], parts: Anatomy) -> list[Tensor]:
    """For each layer (F,): the share of real tokens on which a neuron's output is positive."""
    outputs = [layer.feed_forward.output for layer in parts.layers]
    decoder = decoder_layers(parts)
    active = [torch.zeros(in_features(m), dtype=torch.float64, device=model.device) for m in outputs]
    counts = [0] * len(outputs)
    for batch in first_batches(dataloader):
        batch = forward_arguments(model, batch)
        with _recorded_inputs(outputs) as inputs:
            model(**batch)
        for i, states in inputs.items():  # (B, T, F)
            tokens = real_tokens(batch, states, is_decoder=i in decoder)
            active[i] += ((states > 0) & tokens[..., None]).sum(dim=(0, 1))
            counts[i] += int(tokens.sum())
    if not all(counts):
        raise ValueError("The dataloader gave no tokens: nothing can be said about activations.")
    return [total / count for total, count in zip(active, counts, strict=True)]


@contextmanager
def _recorded_inputs(modules: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    inputs: dict[int, Tensor] = {}

    def record(i: int):
        return lambda module, args: inputs.update({i: args[0]})

    handles = [module.register_forward_pre_hook(record(i)) for i, module in enumerate(modules)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
