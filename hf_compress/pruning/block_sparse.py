"""From zeros to something smaller: empty heads and neurons are cut, the rest stores only blocks that are not empty."""

from hf_compress.model.anatomy import anatomy
from hf_compress.model.classes import ModelT
from hf_compress.model.record import read_part
from hf_compress.model.unfinished import check_finished, check_loaded
from hf_compress.model.weights import check_no_adapters
from hf_compress.surgery.heads import prune_heads
from hf_compress.surgery.neurons import prune_neurons
from hf_compress.surgery.silent import silent_parts
from hf_compress.training.stored import BLOCK_SIZES, store


def to_block_sparse(model: ModelT, block_size: int = 32) -> ModelT:
    """Stop storing blocks of zeros. Changes `model`, whose weights were block-pruned before, and returns it.

    Heads and neurons that add nothing are cut first, as long as whole blocks of them go: the layers left are smaller,
    dense or not. Then each linear map of a layer with an empty block of `block_size` x `block_size`
    becomes a `BlockSparseLinear`. Outputs stay the same but for the order of sums. Blocks of 4 and 8 are stored inside
    blocks of 16. The result trains, is saved and loads with `from_pretrained`.

    Raises ValueError, and changes nothing, for another block size or a model that is quantized or not finished.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}.")
    check_loaded(model, "to_block_sparse")
    check_finished(model, "to_block_sparse")
    check_no_adapters(model)
    if read_part(model.config, "bits") or read_part(model.config, "sparsity"):
        raise ValueError(
            "This model is quantized or block-sparse already. Make it block-sparse once, before quantizing."
        )
    whole = {"head_unit": lambda output: block_size, "neuron_unit": lambda output: block_size}
    heads, neurons = silent_parts(model, anatomy(model), **whole)
    prune_heads(model, heads)
    if neurons:
        prune_neurons(model, neurons)
    store(model, {}, block_size=block_size)
    return model
