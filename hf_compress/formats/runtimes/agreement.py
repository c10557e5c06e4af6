"""Whether a file for another runtime says what the model says that it was written from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.formats.runtimes.readme import decodes, takes_decoder_ids
from hf_compress.model.calibration import run_model
from hf_compress.model.calibration_data import calibration_batches
from hf_compress.model.inputs import example_batch, forward_arguments, forward_names
from hf_compress.model.reading import num_positions

TEXTS = 64
# Root mean square of the differences over that of the outputs. Each runtime rounds inputs to 8 bit in its own way, some
# processors not at all, and 16-bit models leave in float32; a wrong weight gives differences as large as the outputs.
BOUND = {"rounded": 0.1, "float": 1e-3}
SPANS = "start_logits", "end_logits"  # (B, T): one number a token
Arrays = dict[str, np.ndarray]
NOT_GIVEN: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {  # of the shape of the token ids
    "beam_idx": lambda shape: np.arange(shape[0], dtype=np.int32),
    "position_ids": lambda shape: np.tile(np.arange(shape[1]), (shape[0], 1)),
    "token_type_ids": lambda shape: np.zeros(shape, np.int64),
    "attention_mask": lambda shape: np.ones(shape, np.int64),
}


@dataclass(frozen=True)
class Session:
    """A loaded file: what goes in (None: any size), and how it runs."""

    inputs: dict[str, tuple[int | None, ...]]
    run: Callable[[Arrays], Arrays]


def feed(session: Session, batch: Mapping[str, Tensor]) -> Arrays:
    """`batch` as `session` takes it; a cache is empty, what is left over stays out."""
    shape = tuple(batch["input_ids"].shape)
    fed = {}
    for name, (first, *rest) in session.inputs.items():
        name_given = name.removeprefix("input.")
        if name_given in batch:
            fed[name] = batch[name_given].cpu().numpy()
        elif name_given in NOT_GIVEN:
            fed[name] = NOT_GIVEN[name_given](shape)
        else:
            empty = (shape[0] if first is None else first, *(0 if size is None else size for size in rest))
            fed[name] = np.zeros(empty, np.float32)
    return fed


def check_batches(
    model: PreTrainedModel, calibration: Iterable | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Tensor]]:
    """64 texts: the first of `calibration`, else random tokens, a quarter with padding, in decoders at the left."""
    if calibration is not None:
        batches = calibration_batches(calibration, model, tokenizer=tokenizer)
        rows = np.cumsum([0] + [len(batch["input_ids"]) for batch in batches])
        return [forward_arguments(model, batch) for batch, row in zip(batches, rows, strict=False) if row < TEXTS]
    batches = [random_batch(model, length) for length in (32, 20)]
    for batch in batches[1:] if "attention_mask" in batches[1] else ():
        mask = batch["attention_mask"]
        mask[::2, ..., slice(6) if decodes(model) else slice(-6, None)] = 0
        if decodes(model) and "position_ids" in forward_names(model):
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them
    return batches


def random_batch(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """Random texts of so many `tokens`, fewer where the model has not as many positions; two choices an example."""
    if model.main_input_name != "input_ids":
        raise ValueError(f"Models of texts leave for runtimes; {type(model).__name__} takes {model.main_input_name}.")
    batch = example_batch(model, sequence_length=min(tokens, num_positions(model) or tokens))
    if model.config.is_encoder_decoder and not takes_decoder_ids(model):
        batch.pop("decoder_input_ids", None)
        if model.config.eos_token_id is not None:  # BART's and T5's classifiers read the state at the end of a text
            batch["input_ids"][:, -1] = model.config.eos_token_id
    if batch["input_ids"].ndim == 3:
        return {name: value.reshape(-1, 2, value.shape[-1]) for name, value in batch.items()}
    return batch


@torch.no_grad()
def check_runs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Raise ValueError where `model` itself does not run on the first two texts, as its graph will be traced."""
    try:
        run_model(model, {name: value[:2] for name, value in batch.items()})
    except Exception as error:
        shapes = {name: tuple(value[:2].shape) for name, value in batch.items()}
        raise ValueError(
            f"An export runs the model on texts first, and {type(model).__name__} fails on {shapes}: {reason(error)} "
            "Nothing was written."
        ) from error


@torch.no_grad()
def measure_agreement(model: PreTrainedModel, session: Session, batches: Sequence[Mapping[str, Tensor]]) -> dict:
    """For each output: the largest and the relative difference, and the share of equal classes or the mean cosine."""
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for batch in batches:
        found = run_session(model, session, batch)
        mask = batch.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
        for name, expected in run_model(model, batch).items():
            if isinstance(expected, Tensor) and name in found:
                values = expected.float().cpu().numpy(), found[name].astype(np.float32)
                if name in SPANS:
                    values = tuple(value[..., None] for value in values)  # (B, T, 1)
                if mask is not None and values[0].ndim == 3 and values[0].shape[:2] == mask.shape:
                    values = tuple(value[mask.cpu().numpy() > 0] for value in values)  # real tokens
                seen.setdefault(name, []).append(tuple(value.reshape(-1, value.shape[-1]) for value in values))
    if not seen:
        raise RuntimeError(
            f"{type(model).__name__} and its graph have no output of one name, so nothing could be compared, and "
            "nothing was kept. Export as 'plain'."
        )
    pairs = {name: [np.concatenate(parts) for parts in zip(*values, strict=True)] for name, values in seen.items()}
    outputs = {name: compare(*pair, is_class=name.endswith("logits")) for name, pair in pairs.items()}
    return {"texts": sum(len(batch["input_ids"]) for batch in batches), "outputs": outputs}


def run_session(model: PreTrainedModel, session: Session, batch: Mapping[str, Tensor]) -> Arrays:
    """Raises RuntimeError, with the runtime's own reason, where the graph of `model` does not run on `batch`."""
    try:
        return session.run(feed(session, batch))
    except Exception as error:  # each runtime has its own
        shapes = {name: tuple(value.shape) for name, value in batch.items()}
        raise RuntimeError(
            f"The graph of {type(model).__name__} does not run on {shapes}: {reason(error)} Nothing was kept. Export "
            "as 'plain'."
        ) from error


def reason(error: Exception) -> str:
    """What `error` says, or is, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'it says no more'}"


def compare(expected: np.ndarray, found: np.ndarray, *, is_class: bool) -> dict[str, float]:
    """Of rows (rows, C)."""
    difference = found - expected
    size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    result = {
        "largest_difference": float(np.abs(difference).max()),
        "relative_difference": float(np.sqrt(np.mean(np.square(difference, dtype=np.float64)))) / max(size, 1e-30),
    }
    if is_class and expected.shape[1] > 1:
        result["same_class"] = float((expected.argmax(1) == found.argmax(1)).mean())
    else:
        lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
        result["cosine"] = float(((expected * found).sum(1) / np.maximum(lengths, 1e-30)).mean())
    return result


@torch.no_grad()
def first_difference(model: PreTrainedModel, session: Session, batch: Mapping[str, Tensor], bound: float) -> str | None:
    """The first module whose product (`session` gives it under the module's name) differs by more than `bound`."""
    found, result = session.run(feed(session, batch)), []

    def look(name: str, bias: Tensor | None, output: Tensor) -> None:
        product = (output if bias is None else output - bias).float().cpu().numpy()
        if not result and name in found:
            difference = compare(*(a.reshape(-1, product.shape[-1]) for a in (product, found[name])), is_class=False)
            if not difference["relative_difference"] <= bound:
                result.append(name)

    handles = [
        module.register_forward_hook(lambda m, _, output, name=name: look(name, getattr(m, "bias", None), output))
        for name, module in model.named_modules()
        if name in found
    ]
    try:
        run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return result[0] if result else None
