"""What layers, tables and the rest of a model take on disk, and how rare a token may be for a size."""

from pathlib import Path

from transformers import PreTrainedModel

from hf_compress.measuring.counting import num_parameters
from hf_compress.measuring.measure import load_model
from hf_compress.model.anatomy import anatomy
from hf_compress.recipe.data import RecipeData
from hf_compress.recipe.stage import load_for
from hf_compress.shrinking.plan import SMALL_TABLES, LayerSizes, rarest_kept
from hf_compress.shrinking.wish import Wish
from hf_compress.surgery.tokenizer import needed_tokens, token_counts, used_tokens


def min_count_for(wish: Wish, texts: RecipeData, source: str | Path) -> int:
    """How often a token must occur in the training texts for a model of that size."""
    model, tokenizer = load_for(texts, source, fresh_head=True), texts.tokenizer(source)
    counts = token_counts(tokenizer, texts.training_texts())

    def tokens(least: int) -> int:
        return len(needed_tokens(tokenizer, (token for token, count in counts.items() if count >= least)))

    table = model.get_input_embeddings().weight
    return rarest_kept(wish, tokens, table.shape[1], num_parameters(model) - layer_parameters(model) - table.numel())


def layer_sizes(texts: RecipeData, source: str | Path, min_count: int = 1) -> LayerSizes:
    """What whole layers will take on disk, in 8 bit, and all else, the table in fewer.

    min_count  the table is cut to tokens that the texts need so often; 0 where it stays whole
    """
    model = load_for(texts, source, fresh_head=True)
    layers = anatomy(model).layers
    each = num_parameters(layers[0].module)
    table = model.get_input_embeddings().weight
    others = num_parameters(model) - len(layers) * each - table.numel()
    tokens = len(table)
    if min_count:
        tokens = len(used_tokens(texts.tokenizer(source), texts.training_texts(), min_count=min_count))
    rest = (others + tokens * table.shape[1] * SMALL_TABLES / 8) / 1e6
    return LayerSizes(len(layers), each / 1e6, rest, stacks=len(anatomy(model).stacks))


def is_whole(made: Path, texts: RecipeData, source: str | Path) -> bool:
    """Whether nothing was cut from the layers of the model in `source`."""
    return layer_parameters(load_model(made, device="cpu")) == layer_parameters(
        load_for(texts, source, fresh_head=True)
    )


def layer_parameters(model: PreTrainedModel) -> int:
    return sum(num_parameters(layer.module) for layer in anatomy(model).layers)
