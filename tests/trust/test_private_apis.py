"""What is relied on in Transformers without being promised by it: a version that has moved it fails here, by name."""

import inspect
from unittest import mock

import datasets
import pytest
import transformers
from helpers import tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_utils import AttentionInterface
from transformers.quantizers import HfQuantizer

from hf_compress.training.stream import keeps_place

WHERE = f"Transformers {transformers.__version__}"
OVERRIDDEN = (  # in hf_compress/training/state.py and the trainers made of it
    "_determine_best_metric", "_get_output_dir", "_hp_search_setup", "_inner_training_loop", "_load_best_model",
    "_load_optimizer_and_scheduler", "_save_checkpoint", "_save_optimizer_and_scheduler", "call_model_init",
    "create_optimizer", "create_scheduler", "training_step",
)  # fmt: skip

CALLED = (  # by trainers of hf_compress
    "_get_collator_with_removed_columns", "_load_rng_state", "_prepare_inputs", "_remove_unused_columns",
    "_set_signature_columns_if_needed", "compute_loss_context_manager", "create_scheduler", "evaluation_loop",
    "get_batch_samples", "prediction_step",
)  # fmt: skip
ATTRIBUTES = (  # of a trainer, set by its __init__
    "can_return_loss", "label_smoother", "model_accepts_loss_kwargs", "_signature_columns",
    "_created_lr_scheduler",
)  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_the_trainer_has_what_ours_calls_and_extends(name):
    assert hasattr(Trainer, name), f"{WHERE}: Trainer.{name} is gone; trainers of hf_compress call or extend it."


def test_a_trainer_has_the_attributes_that_ours_read(tmp_path):
    trainer = Trainer(tiny_model("bert"), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert not (gone := [name for name in ATTRIBUTES if not hasattr(trainer, name)]), (
        f"{WHERE}: a Trainer lacks {gone}."
    )


def test_attention_is_looked_up_where_a_capture_listens():
    """`hf_compress/model/capture.py` replaces the look-up while it is open."""
    seen, look_up = [], AttentionInterface.get_interface

    def listen(self, name, default):
        seen.append(name)
        return look_up(self, name, default)

    with mock.patch.object(AttentionInterface, "get_interface", listen):
        model = tiny_model("bert")
        model(**tiny_batch(model))
    assert len(seen) == 4, f"{WHERE}: attention is not looked up by AttentionInterface.get_interface, once a layer."


def test_a_shuffle_buffer_can_be_seen():
    """`hf_compress/training/stream.py` looks for it in a stream of datasets: a state without its examples is none."""
    stream = datasets.Dataset.from_dict({"a": range(4)}).to_iterable_dataset()
    assert keeps_place(stream.map(dict)), f"datasets {datasets.__version__}: a stream has no state."
    inside = datasets.interleave_datasets([stream, stream.shuffle(seed=0, buffer_size=2).map(dict)])
    assert not keeps_place(inside), f"datasets {datasets.__version__}: a stream no longer shows its shuffle buffer."


def test_models_say_what_is_tied_and_what_may_be_unexpected():
    """`hf_compress/checkpoint` reads and changes both."""
    model = tiny_model("bert", "mlm")
    tied = getattr(model, "all_tied_weights_keys", {})
    table = "bert.embeddings.word_embeddings.weight"
    assert tied.get("cls.predictions.decoder.weight") == table, f"{WHERE}: all_tied_weights_keys is gone, or otherwise."
    assert hasattr(model, "_keys_to_ignore_on_load_unexpected"), f"{WHERE}: models name no tensors to ignore any more."


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
