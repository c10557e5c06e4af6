"""Classes made at run time: a model that holds one can be saved whole, and copied."""

import copy

import pytest
import torch
from helpers import tiny_model
from silence import logits

import hf_compress as hfc

CASES = {
    "prepared": lambda: hfc.prepare_qat(tiny_model("bart", tie_word_embeddings=False), 4, range_method="minmax"),
    "packed": lambda: hfc.quantize(tiny_model("bart"), 4, embedding_bits=8),
    "factorised": lambda: hfc.factorise_embeddings(tiny_model("bart"), 8),
    "layers-of-a-deeper-one": lambda: hfc.prune_layers(tiny_model("modernbert"), [1, 2, 3]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_with_a_class_of_its_own_can_be_saved_whole_and_copied(name, tmp_path):
    """BART's scaled table and ModernBERT's marked norm are of classes that no module defines."""
    model = CASES[name]().eval()
    torch.save(model, tmp_path / "model.pt")
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert torch.equal(logits(other), logits(model))
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert other.state_dict().keys() == model.state_dict().keys()
