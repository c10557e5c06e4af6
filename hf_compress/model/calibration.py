"""Runs sample batches through a model layer by layer, so that only one layer's inputs are in memory.

What a layer gets besides the hidden states (masks, rotary angles, an encoder's output) is recorded once, in a pass in
which the layers of the stack return their input at once. After that each layer is run by itself on the outputs of the
one before.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_compress.model.anatomy import Stack
from hf_compress.model.precision import fast_forward

HIDDEN = "hidden_states"


class _StackIsDone(Exception):
    """Ends a forward pass once all that was wanted of it is known."""


class HiddenStates:
    """Tensors by batch number (or another name), in memory or as files in a folder."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.tensors = folder, {}

    def __setitem__(self, index: int | str, states: Tensor) -> None:
        if self.folder is None:
            self.tensors[index] = states.cpu()
        else:
            save_file({HIDDEN: states.contiguous()}, self.folder / f"{index}.safetensors")

    def __getitem__(self, index: int | str) -> Tensor:
        if self.folder is None:
            return self.tensors[index]
        return load_file(self.folder / f"{index}.safetensors")[HIDDEN]


class StackInputs:
    """The inputs of the next layer of a stack, for every calibration batch."""

    def __init__(self, stack: Stack, calls: list[list[tuple]], masks: list[Tensor | None],
                 cross_masks: list[Tensor | None], hidden: HiddenStates, fast: bool):  # fmt: skip
        self.stack, self.calls, self.hidden, self.fast = stack, calls, hidden, fast
        self.masks, self.cross_masks = masks, cross_masks
        attentions = [attention for layer in stack.layers for attention in layer.attentions if attention.is_cross]
        self.over_encoder = {module for attention in attentions for module in (attention.key, attention.value)}
        self.index = 0  # of the layer whose inputs these are

    @property
    def num_batches(self) -> int:
        return len(self.masks)

    def run(self, batch: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output states for one batch, (B, T, D); with `weights`, by name, in place of its own."""
        module = self.stack.layers[self.index].module
        args, kwargs = self.calls[self.index][batch]
        hidden = self.hidden[batch].to(next(module.parameters()).device)
        with fast_forward(hidden.device, enabled=self.fast):
            output = functional_call(module, dict(weights or {}), (hidden, *args), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def states(self, hidden: Tensor, batch: int) -> Tensor:
        """The rows (tokens, D) of `hidden` (B, T, D) that are real tokens."""
        return token_rows(hidden, self.masks[batch])

    def tokens(self, module: nn.Module, x: Tensor, batch: int) -> Tensor:
        """The rows of the input `x` of `module` that are real tokens: the encoder's, where a decoder looks at them."""
        return token_rows(x, (self.cross_masks if module in self.over_encoder else self.masks)[batch])

    def advance(self) -> None:
        """Turn the inputs of this layer into those of the next."""
        for batch in range(self.num_batches):
            self.hidden[batch] = self.run(batch)
        self.index += 1


@torch.no_grad()
def capture_stack_inputs(
    model: PreTrainedModel, stack: Stack, batches: Sequence[Mapping], folder: Path | None = None, *, fast: bool = False
) -> StackInputs:
    """Record what the layers of `stack` are called with. Their hidden states are kept on the CPU, or in `folder`.

    With `fast` the layers will run as in `fast_forward`.
    """
    layers = [layer.module for layer in stack.layers]
    device = next(layers[0].parameters()).device
    calls: list[list[tuple]] = [[] for _ in layers]
    hidden, shapes = HiddenStates(folder), []
    example = _layer_output(model, layers[0], batches[0])
    # what a layer hands on beside its states (T5's relative positions) goes into the next ones, so it has to be true
    hands_on = isinstance(example, tuple) and any(isinstance(part, Tensor) for part in example[1:])

    def stub(index: int, forward: Callable, batch: int, *args, **kwargs):
        if HIDDEN in kwargs:
            states = kwargs.pop(HIDDEN)
        else:
            states, args = args[0], args[1:]
        if index == 0:
            hidden[batch] = states
            shapes.append(states.shape)
        calls[index].append((args, kwargs))
        if index == len(layers) - 1:
            raise _StackIsDone
        if hands_on:
            return forward(states, *args, **kwargs)
        return (states, *example[1:]) if isinstance(example, tuple) else states

    for number, batch in enumerate(batches):
        with _replaced_forwards(layers, lambda i, forward, n=number: lambda *a, **k: stub(i, forward, n, *a, **k)):
            try:
                run_model(model, batch, device)
            except _StackIsDone:
                pass
            else:
                raise RuntimeError(f"{type(model).__name__} ran without reaching the last layer of {stack.name}.")
    is_decoder = model.config.is_encoder_decoder and "decoder" in stack.name
    masks = [text_mask(batch, is_decoder=is_decoder) for batch in batches]
    masks = [_fitted(mask, shape, stack.name) for mask, shape in zip(masks, shapes, strict=True)]
    return StackInputs(stack, calls, masks, [text_mask(batch) for batch in batches], hidden, fast)


def text_mask(batch: Mapping, *, is_decoder: bool = False) -> Tensor | None:
    """True for the real tokens of a batch, (B, T); None if all are. `is_decoder`: of what the decoder reads."""
    name = "decoder_attention_mask" if is_decoder and "decoder_input_ids" in batch else "attention_mask"
    mask = batch.get(name)
    if mask is not None and mask.ndim == 3:  # several choices to an example: the model makes a row of each
        mask = mask.flatten(0, 1)
    return None if mask is None or mask.ndim != 2 else mask.bool()


def _fitted(mask: Tensor | None, shape: torch.Size, stack: str) -> Tensor | None:
    """The mask (B, T) with the padding that the model itself put behind it, as for whole windows. shape (B, T', D)"""
    if mask is None or mask.shape == shape[:2]:
        return mask
    if len(shape) != 3 or mask.shape[0] != shape[0] or mask.shape[1] > shape[1]:
        raise ValueError(f"The attention mask {tuple(mask.shape)} does not fit the states {tuple(shape)} of {stack}.")
    return F.pad(mask, (0, shape[1] - mask.shape[1]))


def run_model(model: PreTrainedModel, batch: Mapping, device: torch.device | None = None):
    """A forward pass over `batch` without a key-value cache."""
    device = device or next(model.parameters()).device
    options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, **options)


def _layer_output(model: PreTrainedModel, layer: nn.Module, batch: Mapping) -> Tensor | tuple:
    """What `layer` returns for the first example of `batch`."""
    found = []

    def look(module, args, output):
        found.append(output)
        raise _StackIsDone

    handle = layer.register_forward_hook(look)
    try:
        run_model(model, {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items()})
    except _StackIsDone:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} ran without calling {type(layer).__name__}.")


@contextmanager
def _replaced_forwards(modules: Sequence[nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    before = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def input_groups(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> tuple[list[list[str]], dict[str, int]]:
    """Names of `modules` in the order in which `run()` calls them, and how often it calls each.

    Those that get the same tensors form one group. DeBERTa may call a projection twice: for tokens and for positions.
    """
    calls: dict[str, list[Tensor]] = {}
    with input_hooks(modules, lambda name, x: calls.setdefault(name, []).append(x)):
        run()
    if missing := modules.keys() - calls.keys():
        raise ValueError(
            f"No calibration input reached {sorted(missing)}. Leave them out with `skip_modules`, or calibrate with "
            "data that uses them (an encoder-decoder also needs `decoder_input_ids`)."
        )
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, inputs in calls.items():
        groups.setdefault(tuple(map(id, inputs)), []).append(name)
    return list(groups.values()), {name: len(inputs) for name, inputs in calls.items()}


def inputs_of(
    modules: Mapping[str, nn.Module], run: Callable[[], object], counts: Mapping[str, int]
) -> dict[str, list[Tensor]]:
    """The inputs that `run()` gives to `modules`, each called as often as `counts` says. The last one ends the run."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    wanted = sum(counts[name] for name in modules)

    def see(name: str, x: Tensor) -> None:
        seen[name].append(x)
        if sum(map(len, seen.values())) == wanted:
            raise _StackIsDone

    with input_hooks(modules, see), suppress(_StackIsDone):
        run()
    return seen


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see(name, x)` is called with the input of each of `modules`."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (tokens, K) of an input (..., K) that are real tokens, where `mask` (B, T) fits its shape.

    Some models flatten it (OPT), or put the tokens first (Longformer). What has other rows than tokens (positions, a
    pooler's examples) comes whole.
    """
    if mask is not None:
        mask = mask.to(x.device)
        if x.shape[:-1] == mask.shape:
            return x[mask]
        if x.ndim == 2 and len(x) == mask.numel():
            return x[mask.flatten()]
        if x.ndim == 3 and x.shape[1::-1] == mask.shape:
            return x.transpose(0, 1)[mask]
    return x.reshape(-1, x.shape[-1])


class InputMoments:
    """Sums x x^T over calibration tokens, one matrix at a time: nothing but the (K, K) sums is kept."""

    def __init__(self):
        self.sum: Tensor | None = None  # (K, K) float32
        self.cross: Tensor | None = None  # (K, K): of the uncompressed model's input with this one's
        self.num_samples = 0

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """x (tokens, K); `exact` is what the same tokens gave in the uncompressed model."""
        x = x.float()
        if self.sum is None:
            self.sum = x.new_zeros(x.shape[1], x.shape[1])
            self.cross = None if exact is None else torch.zeros_like(self.sum)
        self.sum.addmm_(x.t(), x)
        if exact is not None:
            self.cross.addmm_(exact.float().t(), x)
        self.num_samples += len(x)

    def sum_over_ranks(self) -> None:
        """Make the sums those of all ranks, each of which has added its own part of the calibration."""
        for tensor in (self.sum, self.cross):
            if tensor is not None:
                dist.all_reduce(tensor)
        count = torch.tensor(self.num_samples, device=self.sum.device)
        dist.all_reduce(count)
        self.num_samples = int(count)

    def hessian(self) -> Tensor:
        """2 X X^T / number of samples."""
        return self.sum * (2 / self.num_samples)

    def cross_hessian(self) -> Tensor | None:
        return None if self.cross is None else self.cross * (2 / self.num_samples)


@contextmanager
def working_folder(on_disk: bool) -> Iterator[Path | None]:
    """A folder for states kept on disk, removed at the end; None when they stay in memory."""
    with tempfile.TemporaryDirectory(prefix="hf_compress_") if on_disk else nullcontext() as folder:
        yield None if folder is None else Path(folder)
