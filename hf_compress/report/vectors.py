"""Embedders against a reference: whether texts that are near in its space are near in another's. No labels."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measuring.measure import evaluating, is_exported
from hf_compress.measuring.metrics import MeanOf, Metric, spearman
from hf_compress.model.inputs import forward_arguments
from hf_compress.model.pooling import read_vectors
from hf_compress.training.progress import progress_bar

NEIGHBOURS = 10
MOST_TEXTS = 4000  # each is compared with each


@torch.inference_mode()
def text_vectors(
    model: PreTrainedModel, folder: str | Path, rows: Sequence[Mapping], collator: Callable, batch_size: int = 32
) -> Tensor:
    """The vector of each row, (n, D) float64 of length 1, as `SentenceTransformer(folder)` makes it."""
    pooling, dense = read_vectors(folder)
    found, model = [], model if is_exported(folder) else model.base_model  # a head reads the states, and hides them
    with evaluating([model]):
        for start in progress_bar(range(0, len(rows), batch_size), desc="Embedding", unit="batch"):
            batch = collator([dict(rows[i]) for i in range(start, min(start + batch_size, len(rows)))])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            states = model(**forward_arguments(model, batch)).last_hidden_state.double()
            vectors = pooling(states, batch.get("attention_mask"))
            found.append(vectors if dense is None else vectors @ dense.to(vectors).mT)
    return F.normalize(torch.cat(found), dim=-1).cpu()


def agreement(vectors: Tensor, reference: Tensor) -> Tensor:
    """(n, 2) of each text: Spearman's correlation of its cosines to all others with the reference's, and the share of
    the reference's `NEIGHBOURS` nearest texts that are among its own nearest.

    vectors (n, D), reference (n, E), of length 1 each. Raises ValueError for fewer than three texts, or too many.
    """
    n = len(vectors)
    if not 3 <= n <= MOST_TEXTS:
        raise ValueError(f"Embedders are compared on 3 to {MOST_TEXTS} texts, got {n}. Use max_examples.")
    others = ~torch.eye(n, dtype=torch.bool)
    mine, theirs = ((x @ x.mT)[others].view(n, n - 1) for x in (vectors.double(), reference.double()))
    k = min(NEIGHBOURS, n - 1)
    near = [torch.zeros(n, n - 1).scatter(1, x.topk(k).indices, 1.0) for x in (mine, theirs)]
    recall = (near[0] * near[1]).sum(-1).double() / k
    ranks = torch.stack([spearman(torch.stack(pair, -1)) for pair in zip(mine, theirs, strict=True)])
    return torch.stack([ranks, recall], -1)


def agreement_metric(values: Tensor, number: str) -> Metric:
    """The metric of a model whose `agreement` is known; `number` is the column that tells which text a row is."""

    def keep(outputs: object, batch: Mapping[str, Tensor], rows: Sequence[Mapping]) -> Tensor:
        return values[[row[number] for row in rows]]

    return Metric("rank correlation of cosines", keep, others={f"recall@{NEIGHBOURS}": MeanOf(1)}, needs=(number,),
                  run=lambda model, arguments: None)  # fmt: skip
