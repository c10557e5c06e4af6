"""An embedding whose rows are made of centroids: of each part of a row one, or the sum of several."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engines.ops import pack_rows, unpack_rows, words_per_row
from hf_compress.engines.routes import choose_dense
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme


class Parts(NamedTuple):
    """A table (V, D) as the layer below stores it."""

    words: Tensor
    levels: Tensor
    bits: int

    @property
    def out_features(self) -> int:
        return len(self.words)

    @property
    def in_features(self) -> int:
        return self.levels.shape[0] * self.levels.shape[-1]

    def weight(self) -> "Parts":
        return self

    def dequantize(self, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
        """The table (V, D), or its rows `ids` (..., D), computed in float32 and then cast."""
        S, T, L, d = self.levels.shape
        words = self.words if ids is None else F.embedding(ids, self.words)
        index = unpack_rows(words, self.bits, S * T).long()  # (..., S * T)
        first = torch.arange(0, S * T * L, L, device=index.device)  # where the centroids of each part and stage begin
        centroids = F.embedding(index + first, self.levels.reshape(-1, d).float())  # (..., S * T, d)
        return centroids.unflatten(-2, (S, T)).sum(-2).flatten(-2).to(dtype)


class ProductEmbedding(PackedEmbedding):
    """Row v, part s: the sum over t of levels[s, t, index[v, s, t]].

    qweight  (V, S * T * bits / 32)  int32, rounded up: the indices, those of a part next to each other
    levels   (S, T, 2^bits, D / S)   float16 or float32, kept when the model is cast
    """

    KEPT = "levels"

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: WeightScheme, *,
                 padding_idx: int | None = None, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None):  # fmt: skip
        part, words = scheme.part_size(embedding_dim), words_per_row(scheme.parts * scheme.stages, scheme.bits)
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.original_class, self.scheme = nn.Embedding, scheme
        self.compute_dtype = dtype or torch.get_default_dtype()
        shape = scheme.parts, scheme.stages, scheme.num_levels, part
        self.register_buffer("qweight", torch.zeros(num_embeddings, words, dtype=torch.int32, device=device))
        self.register_buffer("levels", torch.zeros(shape, dtype=SCALE_DTYPES[scheme.scale_dtype], device=device))

    def fill(self, index: Tensor, levels: Tensor) -> "ProductEmbedding":
        """Pack indices (V, S, T) into the levels (S, T, 2^bits, D / S), in place."""
        device = self.qweight.device
        self.qweight = pack_rows(index.flatten(1).to(torch.uint8), self.scheme.bits).to(device)
        self.levels = levels.to(device, self.levels.dtype)
        self.prepare()
        return self

    def stored(self) -> Parts:
        return Parts(self.qweight, self.levels, self.scheme.bits)

    def _choose(self, stored: Parts):
        return choose_dense(stored.out_features * stored.in_features, decodes=self.decodes)

    def integers(self, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        raise ValueError("A table of centroids has no scales and zero points: export as 'plain', or dequantize.")

    def dequantize(self, dtype: torch.dtype | None = None, ids: Tensor | None = None) -> Tensor:
        return self.stored().dequantize(dtype or self.compute_dtype, ids)

    def check(self, name: str) -> None:
        """Raise ValueError, naming `name`, for loaded tensors that would make NaN. Each index has a centroid."""
        if not self.levels.isfinite().all():
            raise ValueError(f"{name}.levels holds NaN or infinity: the file is damaged.")
