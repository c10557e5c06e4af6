"""What is relied on in Transformers without being promised by it: a version that has moved it fails here, by name."""

import inspect

import pytest
import transformers
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer
from transformers.quantizers import HfQuantizer

WHERE = f"Transformers {transformers.__version__}"
OVERRIDDEN = (  # in hf_compress/training_state.py and the trainers made of it
    "_get_output_dir", "_hp_search_setup", "_inner_training_loop", "_load_best_model", "_load_optimizer_and_scheduler",
    "_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler", "call_model_init",
    "save_model", "training_step",
)  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_trainer_has_what_ours_overrides(name):
    assert hasattr(Trainer, name), f"{WHERE}: Trainer.{name} is gone; trainers of hf_compress override it."


def test_the_state_is_the_last_part_of_a_checkpoint_and_older_ones_go_afterwards():
    source = inspect.getsource(Trainer._save_checkpoint)
    parts = (
        "save_model(",
        "_save_optimizer_and_scheduler(",
        "_save_rng_state(",
        "save_to_json(",
        "rotate_checkpoints(",
    )
    found = [source.find(part) for part in parts]
    assert -1 not in found and found == sorted(found), f"{WHERE}: Trainer._save_checkpoint writes in another order."


def test_the_quantizer_is_told_of_the_files():
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    assert "checkpoint_files=checkpoint_files" in source, f"{WHERE}: quantizers are not told of the files any more."
    for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading"):
        assert hasattr(HfQuantizer, name), f"{WHERE}: HfQuantizer.{name} is gone."


def test_loaded_tensors_are_marked_and_missing_ones_are_not(tmp_path):
    """`hf_compress/checkpoint/tensors.py` tells by the mark what no file has filled."""
    tiny_model("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, file, {"format": "pt"})
    model = type(tiny_model("bert")).from_pretrained(tmp_path)
    unmarked = [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    assert unmarked == ["bert.pooler.dense.bias"], f"{WHERE} marks loaded tensors in another way."
