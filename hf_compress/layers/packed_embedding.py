"""An embedding whose rows are stored in 2, 3, 4 or 8 bit, and what is tied to it: other embeddings, the output head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engines.ops import pack_rows, unpack_rows, words_per_row
from hf_compress.engines.packed_weight import Stored
from hf_compress.layers.packed_module import Multiplies
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.model.classes import made_class

OWN = (
    "qweight",
    "scales",
    "zeros",
    "levels",
    "scheme",
    "compute_dtype",
    "original_class",
    "route",
    "run",
    "decodes",
    "table",
)  # what an ordinary embedding lacks

VALUES_AT_ONCE = 2**18  # looked up together: their passes stay in a core's cache


class PackedEmbedding(Multiplies, nn.Embedding):
    """Rows of few bits, packed along the row so that a lookup reads only its own words.

    qweight  (V, D * bits / 32)  int32, rounded up
    scales   (V, G)              float16 or float32
    zeros    (V, G)              uint8; None when symmetric
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: WeightScheme, *,
                 padding_idx: int | None = None, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None):  # fmt: skip
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.original_class, self.scheme = nn.Embedding, scheme
        self.compute_dtype = dtype or torch.get_default_dtype()
        groups = scheme.num_groups(embedding_dim)
        words = words_per_row(embedding_dim, scheme.bits)
        scale_dtype = SCALE_DTYPES[scheme.scale_dtype]
        self.register_buffer("qweight", torch.zeros(num_embeddings, words, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.ones(num_embeddings, groups, dtype=scale_dtype, device=device))
        self.register_buffer("zeros", None)
        if not scheme.symmetric:
            self.zeros = torch.zeros(num_embeddings, groups, dtype=torch.uint8, device=device)

    @classmethod
    def like(cls, module: nn.Embedding, scheme: WeightScheme) -> "PackedEmbedding":
        """An empty packed table in place of `module`.

        A subclass keeps what its own `forward` adds (BART's offset, Gemma's scale): the new class stands between it and
        `nn.Embedding`, so that its `super().forward` looks up packed rows.
        """
        kind = type(module)
        packed = cls if kind is nn.Embedding else made_class(f"Packed{kind.__name__}", kind, cls)
        weight = module.weight
        layer = packed.__new__(packed)
        cls.__init__(layer, *weight.shape, scheme, padding_idx=module.padding_idx, dtype=weight.dtype,
                     device=weight.device)  # fmt: skip
        for name, value in vars(module).items():
            if name not in vars(layer):
                setattr(layer, name, value)
        for name, buffer in module.named_buffers(recurse=False):
            layer.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        layer.original_class = kind
        return layer

    def fill(self, q: Tensor, scales: Tensor, zero_points: Tensor) -> "PackedEmbedding":
        """Pack integers (V, D) with their scales and zero points (V, G), in place."""
        device = self.qweight.device
        self.qweight = pack_rows(q, self.scheme.bits).to(device)
        self.scales = scales.to(device, self.scales.dtype)
        if self.zeros is not None:
            self.zeros = zero_points.to(device, torch.uint8)
        self.prepare()
        return self

    @property
    def in_columns(self) -> int:
        return self.embedding_dim

    def stored(self) -> Stored:
        return Stored(self.qweight, self.scales, self.zeros, None, self.scheme.bits, self.embedding_dim, by_rows=True)

    def unpacked(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The ordinary module with the dequantized table, of the class it had."""
        module = _without_weight(self.original_class, self)
        module.weight = nn.Parameter(self.dequantize(dtype))
        return module

    def integers(self, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., D) uint8, scales (..., G) and zero points (..., G) of the rows `ids`, by default all of them."""
        q, scales, zeros = self._rows(ids)
        return q, scales, torch.full_like(scales, zeros) if isinstance(zeros, int) else zeros

    def _rows(self, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
        """The same; a zero point that all share is a number, which costs least."""
        words, scales = (t if ids is None else F.embedding(ids, t) for t in (self.qweight, self.scales))
        if self.scheme.bits == 8 and words.device.type == "cpu":  # little-endian, as the words are
            q = words.view(torch.uint8)[..., : self.embedding_dim]
        else:
            q = unpack_rows(words, self.scheme.bits, self.embedding_dim)
        if self.zeros is None:
            return q, scales, 2 ** (self.scheme.bits - 1)
        return q, scales, self.zeros if ids is None else F.embedding(ids, self.zeros)

    def dequantize(self, dtype: torch.dtype | None = None, ids: Tensor | None = None) -> Tensor:
        """The table (V, D), or its rows `ids` (..., D), computed in float32 and then cast."""
        q, scales, zeros = self._rows(ids)
        values = q.float()
        groups = values.unflatten(-1, (scales.shape[-1], -1))  # (..., G, g)
        groups.sub_(zeros if isinstance(zeros, int) else zeros.float()[..., None]).mul_(scales.float()[..., None])
        return values.to(dtype or self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or input.device.type != "cpu":
            return self.dequantize(ids=input)
        if input.numel() >= self.num_embeddings:  # a small table: token types, or positions
            return F.embedding(input, self.dequantize())
        if input.numel() * self.embedding_dim <= VALUES_AT_ONCE:
            return self.dequantize(ids=input)
        parts = input.flatten().split(max(VALUES_AT_ONCE // self.embedding_dim, 1))
        return torch.cat([self.dequantize(ids=part) for part in parts]).view(*input.shape, -1)

    def check(self, name: str) -> None:
        """Raise ValueError, naming `name`, for loaded tensors that would make NaN."""
        if not self.scales.isfinite().all():
            raise ValueError(f"{name}.scales holds NaN or infinity: the file is damaged.")
        if self.zeros is not None and int(self.zeros.max()) >= 2**self.scheme.bits:
            raise ValueError(
                f"{name}.zeros must lie in [0, {2**self.scheme.bits - 1}], got {int(self.zeros.max())}: "
                "the file is damaged."
            )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


def _without_weight(kind: type[nn.Embedding], like: nn.Embedding) -> nn.Embedding:
    """A module of class `kind` with the attributes and buffers of `like`, of which only the table is missing."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__.update({k: v for k, v in vars(like).items() if not k.startswith("_") and k not in OWN})
    for name, buffer in like.named_buffers(recurse=False):
        if name not in OWN:
            module.register_buffer(name, buffer, persistent=name not in like._non_persistent_buffers_set)
    return module


class TiedEmbedding(nn.Embedding):
    """An embedding that shares a packed table: it looks its rows up there and holds nothing that is saved."""

    @classmethod
    def like(cls, module: nn.Embedding, table: PackedEmbedding) -> "TiedEmbedding":
        """In place of `module`; what its class adds to a lookup stays."""
        kind = type(module)
        tied = _without_weight(cls if kind is nn.Embedding else made_class(f"Tied{kind.__name__}", kind, cls), module)
        tied.original_class = kind
        object.__setattr__(tied, "table", table)  # not registered: saved once, where it belongs
        return tied

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def unpacked(self, weight: nn.Parameter) -> nn.Embedding:
        """The ordinary module with the dequantized table of the other."""
        module = _without_weight(self.original_class, self)
        module.weight = weight
        return module

    def forward(self, input: Tensor) -> Tensor:
        return self.table.dequantize(ids=input)


class TiedHead(nn.Linear):
    """The output head that shares a packed embedding: it holds its own bias and only refers to the table."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        object.__setattr__(self, "table", embedding)  # not registered: saved once, where it belongs
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.table.multiply(x, self.bias)
