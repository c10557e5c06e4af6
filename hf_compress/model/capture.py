"""Reads Q, K, V, attention scores and hidden states of chosen layers while a model runs.

Every attention of Transformers is called through `AttentionInterface.get_interface`. While a capture is open that call
is recorded for the modules of interest and passed on unchanged, so sdpa, eager and flash attention run as they are, and
neither the model nor its config is touched. DeBERTa has no attention interface: there hooks read the projections.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from hf_compress.model.anatomy import anatomy
from hf_compress.model.attention import Attention


@dataclass(frozen=True)
class AttentionSignals:
    """What one attention computed, after rotary embeddings and norms of q and k.

    query  (B, H, T, Dh)      key, value  (B, num_key_value_heads, S, Dh)
    bias   (B or 1, H, T, S)  added to the scores, None where there is none
    mask   as the model passed it: boolean or additive (B or 1, 1, T, S), flash attention's (B, S), or None
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    bias: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    sliding_window: int | None = None

    @property
    def scores(self) -> Tensor:
        """Attention scores before mask and softmax, (B, H, T, S)."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)  # (B, H, S, Dh)
        scores = (self.query * self.scaling) @ key.mT
        return scores if self.bias is None else scores + self.bias

    @property
    def allowed(self) -> Tensor:
        """True where a query may attend to a key, (B or 1, 1, T, S)."""
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask[..., : self.key.shape[-2]]
            return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        T, S = self.query.shape[-2], self.key.shape[-2]
        device = self.query.device
        distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)  # (T, S)
        allowed = distance >= 0 if self.is_causal else torch.ones_like(distance, dtype=torch.bool)
        if self.sliding_window is not None:
            allowed = allowed & (distance.abs() < self.sliding_window)
        allowed = allowed[None, None]
        return allowed if self.mask is None else allowed & self.mask[:, None, None, :].bool()


@dataclass
class Signals:
    """Filled while the model runs: `attention[i]` of layer i, `hidden_states[i]` numbered as Transformers does.

    In an encoder-decoder the decoder's layers, and its hidden states, are counted on after the encoder's.
    """

    attention: dict[int, AttentionSignals] = field(default_factory=dict)
    hidden_states: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    model: nn.Module, *, attention: Iterable[int] = (), hidden_states: Iterable[int] = (), cross: bool = False
) -> Iterator[Signals]:
    """Record what the layers numbered in `attention` and `hidden_states` compute in each forward of `model`.

    A later forward replaces what an earlier one recorded. `cross` reads the decoder's cross-attention instead of its
    self-attention. Negative numbers count from the end. On leaving, a signal that was asked for and did not come raises
    RuntimeError; a number that is not there raises ValueError before anything runs.
    """
    attention, hidden_states = list(attention), list(hidden_states)
    signals = Signals()
    layers = anatomy(model).layers if attention else ()
    wanted = {}
    for i in attention:
        index = _checked(i, len(layers), f"attention layer of {type(model).__name__}")
        if cross and len(layers[index].attentions) == 1:
            raise ValueError(f"Layer {i} of {type(model).__name__} has no cross-attention. Choose decoder layers.")
        wanted[layers[index].attentions[cross].module] = (index, layers[index].attentions[cross])
    handles = []
    try:
        handles += _record_attention(wanted, signals)
        if hidden_states:
            handles += _record_hidden_states(model, hidden_states, signals)
        yield signals
    finally:
        for remove in handles:
            remove()
    missing = [i for i, _ in wanted.values() if i not in signals.attention]
    if missing:
        raise RuntimeError(
            f"Attention of layers {missing} was asked for, but {type(model).__name__} did not compute it while the "
            "capture was open. Was the model run inside it, and not a compiled copy of it?"
        )


def _checked(index: int, count: int, what: str) -> int:
    if not -count <= index < count:
        raise ValueError(f"There is no {what} {index}: expected {-count} to {count - 1}.")
    return index % count


def _record_attention(wanted: dict[nn.Module, tuple[int, Attention]], signals: Signals) -> list[Callable]:
    """Start recording; returns what stops it."""
    without_interface = {m: found for m, found in wanted.items() if hasattr(m, "disentangled_attention_bias")}
    through_interface = {m: i for m, (i, _) in wanted.items() if m not in without_interface}
    removers = [remove for m, (i, a) in without_interface.items() for remove in _record_deberta(m, i, a, signals)]
    if not through_interface:
        return removers
    get_interface = AttentionInterface.get_interface

    @wraps(get_interface)
    def recording_get_interface(self, attn_implementation, default):
        run = get_interface(self, attn_implementation, default)

        def record_and_run(module, query, key, value, attention_mask, **kwargs):
            if (layer := through_interface.get(module)) is not None:
                scaling = kwargs.get("scaling")
                causal = kwargs.get("is_causal")
                signals.attention[layer] = AttentionSignals(
                    query, key, value,
                    scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                    bias=kwargs.get("position_bias"),
                    mask=attention_mask,
                    is_causal=getattr(module, "is_causal", True) if causal is None else causal,
                    sliding_window=kwargs.get("sliding_window"),
                )  # fmt: skip
            return run(module, query, key, value, attention_mask, **kwargs)

        return record_and_run

    def restore():
        AttentionInterface.get_interface = get_interface

    AttentionInterface.get_interface = recording_get_interface
    return [*removers, restore]


def _record_deberta(module: nn.Module, layer: int, attention: Attention, signals: Signals) -> list[Callable]:
    """Disentangled attention: content scores from the projections, plus the model's own bias of relative positions."""
    seen = {}
    projections = {"query": attention.query, "key": attention.key, "value": attention.value}

    def keep(name: str) -> Callable:
        def hook(_, args, output):
            seen.setdefault(name, output)  # the first call; a shared key projection also maps the positions

        return hook

    def read(module, args, kwargs, output):
        heads = {n: x.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for n, x in seen.items()}
        seen.clear()
        kinds = len({"c2p", "p2c"} & set(module.pos_att_type))
        scaling = (heads["query"].shape[-1] * (1 + kinds)) ** -0.5
        names = (
            "hidden_states",
            "attention_mask",
            "output_attentions",
            "query_states",
            "relative_pos",
            "rel_embeddings",
        )
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        bias = None
        if module.relative_attention:
            q, k = (heads[n].flatten(0, 1) for n in ("query", "key"))  # (B * H, T, Dh)
            bias = module.disentangled_attention_bias(
                q, k, given.get("relative_pos"), given["rel_embeddings"], 1 + kinds
            )
            bias = bias.unflatten(0, (-1, module.num_attention_heads))
            seen.clear()
        mask = given["attention_mask"].bool()
        signals.attention[layer] = AttentionSignals(heads["query"], heads["key"], heads["value"], scaling, bias, mask)

    handles = [m.register_forward_hook(keep(n)) for n, m in projections.items()]
    handles.append(module.register_forward_hook(read, with_kwargs=True))
    return [h.remove for h in handles]


def _record_hidden_states(model: nn.Module, wanted: list[int], signals: Signals) -> list[Callable]:
    """Ask for the model's own hidden states, keep the wanted ones and take them out of its outputs."""

    def ask(module, args, kwargs):
        return args, {**kwargs, "output_hidden_states": True}

    def keep(module, args, output):
        states = [output[n] for n in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states") if n in output]
        states = [state for stack in states for state in stack]
        if not states:
            raise RuntimeError(f"Hidden states were asked for, but {type(module).__name__} returned none.")
        for i in wanted:
            signals.hidden_states[i] = states[_checked(i, len(states), f"hidden state of {type(module).__name__}")]

    return [
        model.register_forward_pre_hook(ask, with_kwargs=True).remove,
        model.register_forward_hook(keep).remove,
    ]


def require_gradients(student: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError when captured tensors of `student` carry no gradient: their loss would teach nothing.

    Some may be without, where what makes them does not learn: embeddings that are frozen, or beneath adapters.
    """
    learns = [tensor.requires_grad for tensor in tensors]
    if torch.is_grad_enabled() and not all(learns) and (not any(learns) or _is_reentrant(student)):
        raise RuntimeError(
            "A captured signal of the student carries no gradient. With gradient checkpointing, set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}; a frozen student cannot learn from inner layers."
        )


def _is_reentrant(model: nn.Module) -> bool:
    """Whether gradient checkpointing hides from the graph what happens within a layer."""
    running = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in running]
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)
