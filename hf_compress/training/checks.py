"""What is asked before a training begins: how its loss is divided, and whether its weights can be changed."""

import inspect

from torch import nn
from transformers import TrainingArguments


def has_own_mean(model: nn.Module) -> bool:
    """Whether the model's loss is a mean over its batch, whatever `num_items_in_batch` says.

    `Trainer` believes each forward with **kwargs to divide by it, and leaves out its own division by micro-batches and
    ranks. Classes such as `BertForSequenceClassification` do not, and their loss would count that many times.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        source = inspect.getsource(type(plain).forward)
    except (OSError, TypeError):  # no source: believed
        return False
    return "loss_fct" in source and "loss_function" not in source


def check_whole(model: nn.Module, what: str) -> None:
    """Raise ValueError if the weights are sharded over ranks: blocks, groups and ranges would lie across the pieces."""
    if any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            f"{what} while training needs whole weights on each rank, but these are sharded (FSDP or ZeRO-3). Train "
            "with DDP or on one device, or do it before or after training."
        )


def check_own_gradients(args: TrainingArguments, what: str) -> None:
    """Raise ValueError under DeepSpeed, which keeps gradients and the weights it updates in buffers of its own."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        raise ValueError(
            f"{what} while training reads and changes gradients and weights, but DeepSpeed works on copies of its own. "
            "Train with DDP or on one device, or do it before or after training."
        )
