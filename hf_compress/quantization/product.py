"""Product and residual quantization of tables: parts of a row are replaced by centroids, or by sums of them.

Gong et al., 2014, https://arxiv.org/abs/1412.6115; the compression rates are equations 50 and 51 of the text survey.

    W = [W^1, ..., W^s];  W^i_v ~ c^i of k-means on the rows of W^i                 product: s parts, one stage
    W_v ~ c^1 + ... + c^t,  c^j of k-means on what the stages before left           residual: one part, t stages

Both together: each part has its stages. A row takes s * t indices of b bits, a table s * t * 2^b centroids of D / s.
"""

import torch
from torch import Tensor, nn

from hf_compress.layers.product_embedding import ProductEmbedding
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.quantization.grids import check_weight

ROUNDS = 25  # of Lloyd's algorithm
ROWS_AT_ONCE = 2**14  # whose distances to all centroids are in memory together
ROWS_PER_CENTROID = 2  # a table of no more rows than so many a centroid gains nothing: it is rounded as it is


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """Index (V,) of the centroid (L, d) nearest to each of the points (V, d)."""
    lengths = centroids.square().sum(1)
    return torch.cat([(lengths - 2 * rows @ centroids.T).argmin(1) for rows in points.split(ROWS_AT_ONCE)])


def kmeans_centroids(points: Tensor, num_centroids: int) -> Tensor:
    """Centroids (L, d) of points (V, d) by Lloyd's rounds, from points that a fixed seed draws.

    A centroid that no point is nearest to stays where it is.
    """
    drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:num_centroids]
    centroids = points[drawn.to(points.device)].clone()
    for _ in range(ROUNDS):
        index = nearest_centroid(points, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, index, points)
        counts = index.bincount(minlength=num_centroids)[:, None]
        centroids = torch.where(counts > 0, sums / counts, centroids)
    return centroids


def product_quantize(
    weight: Tensor, bits: int, *, parts: int, stages: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Indices (V, S, T) and centroids (S, T, 2^bits, D / S), rounded to `dtype`, of a table (V, D)."""
    indices, levels = [], []
    for residual in weight.unflatten(1, (parts, -1)).unbind(1):  # (V, D / S)
        for _ in range(stages):
            centroids = kmeans_centroids(residual, 2**bits).to(dtype).to(weight.dtype)
            index = nearest_centroid(residual, centroids)
            residual = residual - centroids[index]
            indices.append(index)
            levels.append(centroids)
    return torch.stack(indices, 1).unflatten(1, (parts, stages)), torch.stack(levels).unflatten(0, (parts, stages))


def parts_scheme(table: nn.Embedding, name: str, scheme: WeightScheme, *, parts: int, stages: int) -> WeightScheme:
    """How `table` is stored in parts; one of too few rows or columns keeps `scheme`, that of rounding to nearest."""
    if table.num_embeddings <= ROWS_PER_CENTROID * 2**scheme.bits or table.embedding_dim < parts:
        return scheme
    try:
        found = WeightScheme(scheme.bits, scale_dtype=scheme.scale_dtype, num_levels=2**scheme.bits, parts=parts,
                             stages=stages)  # fmt: skip
        found.part_size(table.embedding_dim)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return found


def install_parts(model: nn.Module, name: str, scheme: WeightScheme) -> None:
    """Put a table of centroids in the place of the embedding `name`."""
    table = model.get_submodule(name)
    check_weight(table.weight, name)
    index, levels = product_quantize(
        table.weight.detach().float(), scheme.bits, parts=scheme.parts, stages=scheme.stages,
        dtype=SCALE_DTYPES[scheme.scale_dtype],
    )  # fmt: skip
    model.set_submodule(name, ProductEmbedding.like(table, scheme).fill(index, levels).train(table.training))
