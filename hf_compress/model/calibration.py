"""Runs sample batches through a model layer by layer, so that only one layer's inputs are in memory.

What a layer gets besides the hidden states (masks, rotary angles, an encoder's output) is recorded once, in a pass in
which the layers of the stack return their input at once. After that each layer is run by itself on the outputs of the
one before.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.model.anatomy import Stack

HIDDEN = "hidden_states"


class _StackIsDone(Exception):
    """Ends a forward pass once all that was wanted of it is known."""


def calibration_batches(calibration: Iterable, model: PreTrainedModel, *, batch_size: int = 8) -> list[dict]:
    """Batches of tensors from a dataset (rows of lists), a list of rows, or anything that yields batches.

    Shorter rows of a batch are padded on the right under an attention mask. Raises ValueError for data that is empty,
    holds no token, or holds tokens that the model's vocabulary does not have.
    """
    rows = [dict(row) for row in calibration]
    if not rows:
        raise ValueError("calibration is empty: pass a dataset with `input_ids`, or batches of tensors.")
    is_batched = all(isinstance(v, Tensor) and v.ndim > 1 for v in rows[0].values())
    starts = range(0, len(rows), batch_size)
    batches = rows if is_batched else [_collate(rows[start : start + batch_size]) for start in starts]
    embeddings = model.get_input_embeddings()
    largest = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
    for batch in batches:
        batch.pop("labels", None)
        ids = batch.get("input_ids")
        if ids is None:
            continue
        if ids.numel() == 0:
            raise ValueError("calibration holds a batch without tokens: drop empty rows before quantizing.")
        if largest is not None and (int(ids.max()) >= largest or int(ids.min()) < 0):
            raise ValueError(
                f"calibration holds token {int(ids.max())}, but the vocabulary of {type(model).__name__} has {largest} "
                "entries. Tokenize the text with this model's own tokenizer."
            )
    return batches


def _collate(rows: Sequence[Mapping]) -> dict:
    if "input_ids" not in rows[0]:
        raise ValueError(
            f"calibration rows must hold `input_ids`, got {sorted(rows[0])}. Tokenize the text first, "
            "e.g. `dataset.map(lambda row: tokenizer(row['text'], truncation=True, max_length=512))`."
        )
    names = [name for name, value in rows[0].items() if name != "labels" and _is_numbers(value)]
    lengths = [len(row["input_ids"]) for row in rows]
    if max(lengths) == 0:
        raise ValueError("calibration holds rows without tokens: drop empty rows before quantizing.")
    batch = {}
    for name in names:
        values = [torch.as_tensor(row[name]) for row in rows]
        batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
    if "attention_mask" not in batch and len(set(lengths)) > 1:
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def _is_numbers(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, (int, float)) for v in value)
    )


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

    def __init__(self, stack: Stack, calls: list[list[tuple]], masks: list[Tensor | None], hidden: HiddenStates,
                 fast: bool):  # fmt: skip
        self.stack, self.calls, self.masks, self.hidden, self.fast = stack, calls, masks, hidden, fast
        self.index = 0  # of the layer whose inputs these are

    @property
    def num_batches(self) -> int:
        return len(self.masks)

    def run(self, batch: int) -> Tensor:
        """The layer's output states for one batch, (B, T, D)."""
        module = self.stack.layers[self.index].module
        args, kwargs = self.calls[self.index][batch]
        hidden = self.hidden[batch].to(next(module.parameters()).device)
        with fast_forward(hidden.device, enabled=self.fast):
            output = module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

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
    masks: list[Tensor | None] = []
    hidden = HiddenStates(folder)
    returns_tuple = _layer_returns_tuple(model, layers[0], batches[0])

    def stub(index: int, batch: int, *args, **kwargs):
        if HIDDEN in kwargs:
            states = kwargs.pop(HIDDEN)
        else:
            states, args = args[0], args[1:]
        if index == 0:
            hidden[batch] = states
        calls[index].append((args, kwargs))
        if index == len(layers) - 1:
            raise _StackIsDone
        return (states, None) if returns_tuple else states

    is_decoder = model.config.is_encoder_decoder and "decoder" in stack.name
    for number, batch in enumerate(batches):
        with _replaced_forwards(layers, lambda i, n=number: lambda *a, **k: stub(i, n, *a, **k)):
            try:
                run_model(model, batch, device)
            except _StackIsDone:
                pass
            else:
                raise RuntimeError(f"{type(model).__name__} ran without reaching the last layer of {stack.name}.")
        mask = batch.get("decoder_attention_mask" if is_decoder else "attention_mask")
        masks.append(None if mask is None or mask.ndim != 2 else mask.bool())
    return StackInputs(stack, calls, masks, hidden, fast)


def run_model(model: PreTrainedModel, batch: Mapping, device: torch.device | None = None):
    """A forward pass over `batch` without a key-value cache."""
    device = device or next(model.parameters()).device
    options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, **options)


def _layer_returns_tuple(model: PreTrainedModel, layer: nn.Module, batch: Mapping) -> bool:
    found = []

    def look(module, args, output):
        found.append(isinstance(output, tuple))
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
def _replaced_forwards(modules: Sequence[nn.Module], make: Callable[[int], Callable]) -> Iterator[None]:
    before = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def input_groups(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Names of `modules` in the order in which `run()` calls them; those that get the same tensor form one group."""
    order: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        for seen, names in order:
            if seen is x:
                if name not in names:
                    names.append(name)
                return
        order.append((x, [name]))

    with input_hooks(modules, note):
        run()
    missing = modules.keys() - {name for _, names in order for name in names}
    if missing:
        raise ValueError(
            f"No calibration input reached {sorted(missing)}. Leave them out with `skip_modules`, or calibrate with "
            "data that uses them (an encoder-decoder also needs `decoder_input_ids`)."
        )
    return [names for _, names in order]


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
    """The rows (tokens, K) of an input (..., K) that are real tokens, where `mask` (B, T) fits its shape."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
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
def fast_matmul(*, enabled: bool = True) -> Iterator[None]:
    """Let float32 products on the CPU multiply in bfloat16 and add in float32, where the processor has units for it."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if enabled and has_fast_bfloat16(torch.device("cpu")) else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def fast_forward(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where `device` has units for it; states that layers add up stay as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and has_fast_bfloat16(device))


def has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


@contextmanager
def working_folder(on_disk: bool) -> Iterator[Path | None]:
    """A folder for states kept on disk, removed at the end; None when they stay in memory."""
    with tempfile.TemporaryDirectory(prefix="hf_compress_") if on_disk else nullcontext() as folder:
        yield None if folder is None else Path(folder)
