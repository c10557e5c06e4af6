"""Tokens, cut out for good: rows of the embeddings, of the output head and of its biases, and of the tokenizer."""

import copy
import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.model.anatomy import input_embeddings
from hf_compress.model.record import read_part
from hf_compress.model.unfinished import check_finished
from hf_compress.surgery.settle import build_twin
from hf_compress.surgery.token_numbers import NewNumbers, configs_of, role_tokens
from hf_compress.surgery.tokenizer import needed_tokens, smaller_tokenizer
from hf_compress.surgery.transaction import Transaction

logger = logging.getLogger(__name__)


def prune_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, keep: Iterable[int]
) -> PreTrainedTokenizerBase:
    """Keep only some tokens. Changes `model`, and returns its new tokenizer; the one given stays as it is.

    `keep` holds token ids, e.g. `used_tokens(tokenizer, texts)`. Special tokens, single characters and the pieces that
    byte-pair merges need are kept beside them. Texts of kept tokens get the same tokens, under new numbers, and the
    same outputs; other words are spelled in smaller pieces. Tied tables stay tied and the checkpoint stays a plain one.
    Token ids of the config and the generation config are renumbered: tokens with a role (`eos_token_id`, ...) are kept,
    and what else refers to a token that is gone, such as a forbidden word, is dropped and logged.

    Raises ValueError, and changes nothing, for tokens that do not exist and models whose table cannot be cut.
    """
    check_finished(model, "prune_vocabulary")
    table = input_embeddings(model)
    if table is None:
        raise ValueError(f"{type(model).__name__} has no one table of tokens that could be cut.")
    if not isinstance(table, nn.Embedding) or "weight" not in table._parameters:
        raise ValueError(f"{type(table).__name__} is no table of tokens that can be cut.")
    size = table.num_embeddings
    configs = [*configs_of(model.config), *configs_of(getattr(model, "generation_config", None))]
    roles = set().union(*map(role_tokens, configs)) & set(tokenizer.get_vocab().values())
    kept = needed_tokens(tokenizer, {*keep, *roles})
    if kept[-1] >= size:
        raise ValueError(f"The tokenizer has a token {kept[-1]}, the model {size} rows: they do not belong together.")
    smaller = smaller_tokenizer(tokenizer, kept)
    new = {old: i for i, old in enumerate(kept)}
    numbers = NewNumbers(new, size)
    with Transaction(model) as transaction:
        for config in configs:
            for field, value in numbers.fields(config).items():
                transaction.set(config, field, value)
        transaction.set(model.config, "vocab_size", len(kept))
        _cut_tables(transaction, model, size, kept)
    if numbers.dropped:
        logger.warning("Dropped, as their tokens are gone from the vocabulary: %s.", ", ".join(numbers.dropped))
    return smaller


def _cut_tables(transaction: Transaction, model: PreTrainedModel, size: int, kept: list[int]) -> None:
    """What has another shape in a model with the smaller vocabulary is a table over tokens: keep the rows `kept`."""
    config = copy.deepcopy(model.config)
    config.vocab_size = len(kept)
    config.pad_token_id = kept.index(config.pad_token_id) if config.pad_token_id in kept else None
    twin = dict(build_twin(model, config, read_part(model.config, "structure")).named_modules())
    done: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        other = twin.get(name)
        if other is None:
            continue
        for key, tensor in {**module._parameters, **module._buffers}.items():
            wanted = None if tensor is None else getattr(other, key, None)  # factors of a map are no table over tokens
            if wanted is None or _is_same_apart_from_layers(tensor, wanted, size):
                continue
            if id(tensor) not in done:
                done[id(tensor)] = _rows(f"{name}.{key}", tensor, size, kept)
            transaction.set(module, key, done[id(tensor)])
        for key, value in vars(module).items():
            if isinstance(value, int) and value == size and getattr(other, key, None) == len(kept):
                transaction.set(module, key, len(kept))
        if isinstance(module, nn.Embedding):
            transaction.set(module, "padding_idx", other.padding_idx)


def _is_same_apart_from_layers(tensor: Tensor, wanted: Tensor, size: int) -> bool:
    """Heads and neurons that were cut differ as well, but not in a dimension of the vocabulary's size."""
    changed = [a for a, b in zip(tensor.shape, wanted.shape, strict=True) if a != b]
    return size not in changed


def _rows(name: str, tensor: Tensor, size: int, kept: list[int]) -> Tensor:
    dims = [dim for dim, length in enumerate(tensor.shape) if length == size]
    if len(dims) != 1:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}: which of it are tokens cannot be told.")
    cut = tensor.detach().index_select(dims[0], torch.tensor(kept, device=tensor.device))
    return nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
