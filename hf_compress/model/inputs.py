"""Batches to run a model on: real rows, or random tokens."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.model.reading import num_positions
from hf_compress.model.tasks import auto_class_name

THROUGHPUT_BATCH = 32


def forward_arguments(model: PreTrainedModel, batch: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of `batch` that the model's forward takes, labels left out, on its device."""
    names = forward_names(model)
    return {key: value.to(model.device) for key, value in batch.items() if key in names and isinstance(value, Tensor)}


def forward_names(model: PreTrainedModel) -> set[str]:
    """Names of the arguments that the model's forward spells out, without the labels."""
    return set(inspect.signature(model.forward).parameters) - {"labels", "kwargs"}


def example_batch(
    model: PreTrainedModel, *, sequence_length: int, inputs: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A batch of 32 on the model's device: the rows of `inputs`, repeated, or random tokens."""
    if inputs is not None:
        batch = forward_arguments(model, inputs)
        if model.main_input_name not in batch:
            raise ValueError(f"inputs must hold {model.main_input_name!r}, got {sorted(inputs)}.")
        rows = torch.arange(THROUGHPUT_BATCH) % len(batch[model.main_input_name])
        return {key: value[rows.to(value.device)] for key, value in batch.items()}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name!r}, not tokens: give real examples as `inputs`."
        )
    longest = num_positions(model)
    if not 1 <= sequence_length <= (longest or sequence_length):
        raise ValueError(
            f"sequence_length must lie between 1 and the {longest} positions that the model has, got {sequence_length}."
        )
    choices = (1,) if auto_class_name(model) == "AutoModelForMultipleChoice" else ()  # an example is one of them
    input_ids = _random_tokens(model, (THROUGHPUT_BATCH, *choices, sequence_length))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = input_ids
    return forward_arguments(model, batch)


def _random_tokens(model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    """Tokens (B, T) without the special ones: padding would be skipped, and BART counts its end-of-sequence tokens."""
    names = ("pad", "bos", "eos", "cls", "sep", "decoder_start")
    special = {getattr(model.config, f"{name}_token_id", None) for name in names} - {None}
    vocabulary = model.get_input_embeddings().num_embeddings
    allowed = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(0)
    return allowed[torch.randint(len(allowed), shape, generator=generator)]
