"""One short training run in a process of its own: `python training_run.py OUTPUT METHOD [options]`.

Writes final.safetensors (weights of student and training state) and log.json. `--kill-at N` ends the process as a power
cut would, after step N or, with `--in-save`, in the middle of the save of step N.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))

from distillation.data import rows  # noqa: E402
from helpers import tiny_model  # noqa: E402

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.methods.tinybert import TinyBertConfig, TinyBertTrainer  # noqa: E402
from hf_compress.distillation.students import make_student  # noqa: E402
from hf_compress.distillation.trainer import DistillationTrainer  # noqa: E402

METHODS = {
    "soft-targets": (DistillationConfig, DistillationTrainer, {"hints": "1:2,2:4", "teacher_noise": 0.1}),
    "tinybert": (TinyBertConfig, TinyBertTrainer, {"intermediate_share": 0.5}),
}


class Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--in-save", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-dropout", action="store_true")
    run = parser.parse_args()

    torch.set_num_threads(1)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if run.no_dropout else {}
    teacher = tiny_model("bert", seed=3, **dropout)
    teacher.classifier.weight.data *= 30  # a teacher that is sure of something
    torch.manual_seed(5)
    student = make_student(teacher, num_hidden_layers=2, hidden_size=16)
    config, trainer_class, options = METHODS[run.method]
    if run.no_dropout:
        options = {**options, "teacher_noise": 0.0}
    args = config(
        str(run.output), use_cpu=True, max_steps=run.steps, per_device_train_batch_size=run.batch_size, logging_steps=1,
        report_to="none", save_strategy="steps" if run.save_steps else "no", save_steps=run.save_steps or 500,
        disable_tqdm=True, learning_rate=1e-3, **options,
    )  # fmt: skip
    trainer = trainer_class(student, args, teacher_model=teacher, train_dataset=rows(40))
    if run.kill_at and run.in_save:
        save = type(trainer)._save_rng_state

        def torn_save(folder):
            if trainer.state.global_step == run.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            save(trainer, folder)

        trainer._save_rng_state = torn_save
    elif run.kill_at:
        trainer.add_callback(Kill(run.kill_at))
    trainer.train(resume_from_checkpoint=run.resume)
    if trainer.is_world_process_zero():
        tensors = {**student.state_dict(), **{f"state.{n}": t for n, t in trainer.training_state.state_dict().items()}}
        save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, run.output / "final.safetensors")
        (run.output / "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


if __name__ == "__main__":
    main()
