"""What is asked before a training begins: how its loss is divided, and whether its weights can be changed."""

import ast
import inspect
import textwrap

from torch import nn
from transformers import TrainingArguments

from hf_compress.model.tasks import Task, auto_class_name, plain_model, problem_of


def has_own_mean(model: nn.Module) -> bool:
    """Whether the loss of a Transformers model is the mean over its batch, whatever `num_items_in_batch` says.

    It is where forward computes a loss itself, or calls the common one without what it was told of the whole step; and
    of spans, several labels and numbers everywhere: `num_items_in_batch` does not count them. `Trainer` believes each
    forward with **kwargs to divide by it.
    """
    plain = plain_model(model)
    source = _source_of_forward(type(plain))
    if "loss_fct" not in source and (auto_class_name(plain) is None or "loss" not in source):
        return False  # a loss of the user's own, which is believed, or none
    if Task.of(plain).kind == "spans" or problem_of(plain) != "one_label":
        return True
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    common = [call for call in calls if getattr(call.func, "attr", None) == "loss_function"]
    return not common or any(all(keyword.arg is not None for keyword in call.keywords) for call in common)


def _source_of_forward(kind: type) -> str:
    """The text of a class's forward, and of those that it calls by super(); empty where there is none."""
    found = ""
    try:
        for base in kind.__mro__:
            if "forward" in vars(base):
                own = textwrap.dedent(inspect.getsource(vars(base)["forward"]))
                found += own
                if "super()" not in own:
                    break
    except (OSError, TypeError):
        return ""
    return found


def check_own_gradients(args: TrainingArguments, what: str) -> None:
    """Raise ValueError under DeepSpeed, which keeps gradients and the weights it updates in buffers of its own."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        raise ValueError(
            f"{what} while training reads and changes gradients and weights, but DeepSpeed works on copies of its own. "
            "Train with DDP, FSDP2 or on one device, or do it before or after training."
        )
