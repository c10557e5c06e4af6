"""How much each attention head matters: by the gradient of its gate, or by how sure of itself it is."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import anatomy
from hf_compress.model.calibration_data import first_batches
from hf_compress.model.capture import AttentionSignals, capture
from hf_compress.model.cuttable import cuttable
from hf_compress.model.inputs import forward_arguments
from hf_compress.model.unfinished import check_loaded
from hf_compress.pruning.importance.gates import mean_absolute_gradients, padded_rows
from hf_compress.pruning.importance.tokens import decoder_layers, real_tokens


def head_importance(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Tensor]],
    *,
    method: Literal["gradient", "confidence"] = "gradient",
    normalize: bool = True,
) -> Tensor:
    """Importance of every head, (L, H): row i belongs to `anatomy(model).attentions[i]`, nan where it has fewer heads.

    dataloader  batches as a tokenizer and a collator make them; `gradient` needs labels in them
    method      gradient: mean over examples of |d loss / d gate| (Michel et al. 2019, https://arxiv.org/abs/1905.10650);
                confidence: mean over tokens of the largest attention weight, the last token of an example left out as
                one to attend to (Voita et al. 2019, https://arxiv.org/abs/1905.09418)
    normalize   divide each row of gradients by its L2 norm, as Michel et al. do; confidences are never divided

    The model runs in eval mode and is left as it was. Raises ValueError for data without examples or labels.
    """
    check_loaded(model, "head_importance")
    with evaluating([model]):
        if method == "gradient":
            attentions = cuttable(model).attentions
            rows = mean_absolute_gradients(
                model, dataloader, [a.output for a in attentions], [a.head_dim for a in attentions]
            )
            if normalize:
                rows = [row / row.norm().clamp(min=torch.finfo(row.dtype).tiny) for row in rows]
            return padded_rows(rows)
        if method == "confidence":
            return padded_rows(_confidences(model, dataloader))
    raise ValueError(f"method must be 'gradient' or 'confidence', got {method!r}.")


@torch.no_grad()
def _confidences(model: PreTrainedModel, dataloader: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    parts = anatomy(model)
    decoder = decoder_layers(parts)
    places = [(i, cross) for i, layer in enumerate(parts.layers) for cross in range(len(layer.attentions))]
    selves, crosses = ([i for i, cross in places if cross == kind] for kind in (0, 1))
    sums: dict[tuple[int, int], Tensor] = {}
    counts = dict.fromkeys(places, 0)
    for batch in first_batches(dataloader):
        batch = forward_arguments(model, batch)
        with capture(model, attention=selves) as own, capture(model, attention=crosses, cross=True) as over:
            model(**batch)
        for i, cross in places:
            signals = (over if cross else own).attention[i]
            queries = real_tokens(batch, signals.query[:, 0], is_decoder=i in decoder)
            keys = real_tokens(batch, signals.key[:, 0], is_decoder=i in decoder and not cross)
            sums[i, cross] = sums.get((i, cross), 0) + _largest_weights(signals, queries, keys)
            counts[i, cross] += int(queries.sum())
    if not all(counts.values()):
        raise ValueError("The dataloader gave no tokens: nothing can be said about confidence.")
    return [sums[place] / counts[place] for place in places]


def _largest_weights(signals: AttentionSignals, queries: Tensor, keys: Tensor) -> Tensor:
    """(H,) sum over real queries (B, T) of the largest weight among the real keys (B, S), each row's last left out."""
    scores = signals.scores.double().masked_fill(~signals.allowed, -torch.inf)  # (B, H, T, S)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a query that may attend to nothing has no weights
    positions = torch.arange(keys.shape[1], device=keys.device)
    last = (positions * keys).amax(dim=1, keepdim=True)  # (B, 1)
    weights = weights * (keys & (positions != last))[:, None, None, :]
    return (weights.amax(dim=-1) * queries[:, None]).sum(dim=(0, 2))
