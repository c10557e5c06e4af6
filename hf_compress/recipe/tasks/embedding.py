"""Texts that become one vector each; there is nothing to learn but what a teacher makes of them."""

from hf_compress.recipe.tasks.language import OfTexts
from hf_compress.recipe.texts import tokenize

NUMBER = "number"  # of a row, in what is measured


class Embeddings(OfTexts):
    """No labels and no head: a student is held against its teacher, and compared with it."""

    name = "embeddings"
    auto_class = "AutoModel"
    endings = ("Model",)
    predicts = "vectors of texts"
    is_trained_on_labels = False

    def fits(self, config, texts):
        return True  # of any model the states are read

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        encoded = tokenize(texts.splits, tokenizer, max_length)
        if not measured:
            return encoded
        return encoded.map(lambda row, number: {NUMBER: number}, with_indices=True, desc="Tokenizing")
