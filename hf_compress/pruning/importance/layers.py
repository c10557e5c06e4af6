"""Which layers can go: by how little they change what passes through, by their number, or by trying it out."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import anatomy
from hf_compress.model.calibration_data import first_batches
from hf_compress.model.inputs import forward_arguments
from hf_compress.model.unfinished import check_loaded
from hf_compress.pruning.importance.tokens import decoder_layers, real_tokens

logger = logging.getLogger(__name__)


def layer_importance(model: PreTrainedModel, dataloader: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Block influence of every layer, (L,): 1 - cosine of a token's state before and after, mean over real tokens.

    Men et al. 2024, https://arxiv.org/abs/2403.03853. Layers are numbered as in `anatomy(model).layers`. The model runs
    in eval mode and is left as it was. Raises ValueError for data without tokens.
    """
    check_loaded(model, "layer_importance")
    parts = anatomy(model)
    decoder = decoder_layers(parts)
    sums = torch.zeros(len(parts.layers), dtype=torch.float64)
    counts = torch.zeros(len(parts.layers), dtype=torch.float64)
    blocks = [layer.module for layer in parts.layers]
    with evaluating([model]), torch.no_grad():
        for batch in first_batches(dataloader):
            batch = forward_arguments(model, batch)
            with _recorded_states(blocks) as states:
                model(**batch)
            for i, (before, after) in states.items():
                tokens = real_tokens(batch, before, is_decoder=i in decoder)
                cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)  # (B, T)
                sums[i] += float((1 - cosine)[tokens].sum())
                counts[i] += int(tokens.sum())
    if not counts.all():
        raise ValueError("The dataloader gave no tokens: nothing can be said about the influence of layers.")
    return (sums / counts).float()


def every_other(num_layers: int, share: float) -> list[int]:
    """The layers to keep when a share of them goes: layer l goes if l % floor(1 / share) == 0.

    LayerDrop's rule (Fan et al. 2020, https://arxiv.org/abs/1909.11556, section 3.2), `l` counted from 1 so that the
    first layer stays. Above a half that rule would drop everything; then the layers kept are spread evenly, the last
    one among them. Raises ValueError unless share lies in (0, 1) and a layer is left.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}.")
    if share <= 0.5:
        period = int(1 / share)
        keep = [layer for layer in range(num_layers) if (layer + 1) % period]
    else:
        count = round(num_layers * (1 - share))
        keep = [(i + 1) * num_layers // count - 1 for i in range(count)]
    if not keep:
        raise ValueError(f"share={share} of {num_layers} layers leaves none. Choose a smaller share.")
    return keep


def search_layers(model: PreTrainedModel, evaluate: Callable[[PreTrainedModel], float], num_layers: int) -> list[int]:
    """The `num_layers` layers to keep, found on validation data: again and again the layer goes that is missed least.

    evaluate(model) gives a score, higher is better, e.g. the accuracy on a validation set. It is called with layers
    passed over, at most L * (L - num_layers) times. The model is left as it was; `prune_layers(model, keep)` cuts.
    Each encoder and decoder keeps at least one layer. Raises ValueError if there are not so many layers.
    """
    parts = anatomy(model)
    stack_of = {layer.module: stack.name for stack in parts.stacks for layer in stack.layers}
    keep = list(range(len(parts.layers)))
    if not len(parts.stacks) <= num_layers <= len(keep):
        raise ValueError(f"num_layers must lie between {len(parts.stacks)} and {len(keep)}, got {num_layers}.")
    while len(keep) > num_layers:
        scores = {}
        for candidate in keep:
            left = [i for i in keep if i != candidate]
            if len({stack_of[parts.layers[i].module] for i in left}) < len(parts.stacks):
                continue
            with skipped([parts.layers[i].module for i in range(len(parts.layers)) if i not in left]):
                scores[candidate] = evaluate(model)
        worst = max(scores, key=lambda i: scores[i])  # the first of equals
        logger.info("without layer %d the score is %.4f", worst, scores[worst])
        keep.remove(worst)
    return keep


@contextmanager
def skipped(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, these layers run but pass on what they were given."""

    def pass_on(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handles = [block.register_forward_hook(pass_on, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded_states(blocks: list[nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Filled while the model runs: block -> its hidden states before and after, (B, T, D) each."""
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def record(i: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            states[i] = (before, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [block.register_forward_hook(record(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
