"""The table of tokens as a product of two thin matrices: in a small encoder it is half of the file."""

from torch import nn

from hf_compress.checkpoint.factors import retie_low_rank
from hf_compress.layers.low_rank import factors, low_rank_class, make_low_rank
from hf_compress.model.anatomy import input_embeddings
from hf_compress.model.classes import ModelT
from hf_compress.model.unfinished import check_finished, check_loaded
from hf_compress.model.weights import check_no_adapters
from hf_compress.pruning.low_rank import record_ranks


def factorise_embeddings(model: ModelT, rank: int) -> ModelT:
    """Changes `model` and returns it: its table (V, D) of tokens becomes the nearest product (V, rank) @ (rank, D).

    Everything tied to the table (an output head, the tables of an encoder and a decoder) shares both factors. The
    result trains, is saved and loads like any other model, with hf_compress imported. It is smaller if
    rank < V * D / (V + D). Raises ValueError, and changes nothing, for a rank that the table does not have, and for a
    table that is packed or factorised already.
    """
    check_loaded(model, "factorise_embeddings")
    check_finished(model, "factorise_embeddings")
    check_no_adapters(model)
    embeddings = input_embeddings(model)
    weight = getattr(embeddings, "_parameters", {}).get("weight")
    if embeddings is None:
        raise ValueError(f"{type(model).__name__} has no one table of tokens that could be factorised.")
    if weight is None:
        raise ValueError(f"{type(embeddings).__name__} holds no plain table; factorise before quantizing, and once.")
    tied = {name: module for name, module in model.named_modules() if module._parameters.get("weight") is weight}
    for module in tied.values():
        low_rank_class(type(module))  # raises before anything has changed
    table, projection = (nn.Parameter(f, requires_grad=weight.requires_grad) for f in factors(weight, rank))
    for module in tied.values():
        make_low_rank(module, table, projection)
    retie_low_rank(model)
    record_ranks(model, dict.fromkeys(tied, rank))
    return model
