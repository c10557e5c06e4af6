"""One short pruning run in a process of its own, `python pruning_run.py OUTPUT BATCH_SIZE`: ranks write their masks."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from distillation.data import rows  # noqa: E402
from helpers import tiny_model  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

import hf_compress as hfc  # noqa: E402
from hf_compress.training.state import TrainingStateMixin  # noqa: E402


def main():
    output, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    args = TrainingArguments(
        str(output), use_cpu=True, max_steps=6, per_device_train_batch_size=batch_size, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    callbacks = [
        hfc.HeadPruning(0.4, begin=0.0, end=0.7, num_updates=2),
        hfc.WeightPruning(0.3, method="movement", begin=0.0, end=1.0, num_updates=1),
    ]
    trainer = TrainingStateMixin(model, args, train_dataset=rows(48), callbacks=callbacks)
    trainer.train()
    tensors = {name: tensor.float() for name, tensor in trainer.training_state.state_dict().items() if "head" in name}
    tensors |= {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "attention" in name}
    save_file(tensors, output / f"rank-{args.process_index}.safetensors")


if __name__ == "__main__":
    main()
