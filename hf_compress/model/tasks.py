"""What a model predicts, and which of its logits count: sequences, tokens, spans."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

AUTO_CLASSES = {  # mapping of class names -> the Auto class that loads them
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AutoModelForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "AutoModelForQuestionAnswering",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "AutoModelForMaskedLM",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForImageClassification",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "AutoModelForMultipleChoice",
    "MODEL_MAPPING_NAMES": "AutoModel",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": "AutoModelForPreTraining",  # last: most of these have a task as well
}
PER_TOKEN = ("AutoModelForTokenClassification", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
LANGUAGE_MODELS = PER_TOKEN[1:]
OF_LABELS = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")  # read `problem_type`


def plain_model(model: nn.Module) -> nn.Module:
    """The Transformers model inside an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def auto_class_name(model: nn.Module) -> str | None:
    """The Auto class that loads models like this one, or like what its class is made of; None for one of nobody's."""
    for name in (kind.__name__ for kind in type(plain_model(model)).__mro__):
        for mapping, auto_class in AUTO_CLASSES.items():
            if any(name in ([v] if isinstance(v, str) else v) for v in getattr(modeling_auto, mapping).values()):
                return auto_class
    return None


def problem_of(model: nn.Module) -> Literal["one_label", "several_labels", "regression"]:
    """What kind of labels `model` predicts; Transformers may learn it from the first batch.

    Classifiers alone are told by their config, in which a model with another head may still have what was said of one.
    """
    if not has_problem(model):
        return "one_label"
    config = getattr(plain_model(model), "config", None)
    problem_type = getattr(config, "problem_type", None)
    if problem_type == "multi_label_classification":
        return "several_labels"
    is_regression = problem_type == "regression" or getattr(config, "num_labels", 2) == 1
    return "regression" if is_regression else "one_label"


def has_problem(model: nn.Module) -> bool:
    """Whether the `problem_type` of its config means something: of classifiers, and of models of one's own."""
    return auto_class_name(model) in (None, *OF_LABELS)


@dataclass(frozen=True)
class Task:
    """kind: `sequence` has one prediction an example, `tokens` one a position, `spans` a start and an end an example.

    is_shifted: the logits of a position predict the next one (causal language models).
    """

    kind: Literal["sequence", "tokens", "spans"]
    is_shifted: bool

    @staticmethod
    def of(model: nn.Module) -> "Task":
        auto_class = auto_class_name(model)
        kind = (
            "spans"
            if auto_class == "AutoModelForQuestionAnswering"
            else "tokens"
            if auto_class in PER_TOKEN
            else "sequence"
        )
        return Task(kind, auto_class == "AutoModelForCausalLM")

    def counted(self, inputs: dict) -> Tensor | None:
        """The positions whose logits count, (B, T) or one shorter when shifted; None where each example counts once.

        Where there are labels: those that are not -100. Without labels: all real tokens.
        """
        if self.kind != "tokens":
            return None
        if (labels := inputs.get("labels")) is not None:
            counted = labels != -100
        else:
            side = "decoder_" if "decoder_input_ids" in inputs else ""
            mask = inputs.get(f"{side}attention_mask")
            counted = torch.ones_like(inputs[f"{side}input_ids"]).bool() if mask is None else mask.bool()
        return counted[:, 1:] if self.is_shifted else counted

    def tokens(self, states: Tensor, inputs: Mapping, *, is_decoder: bool = False) -> tuple[Tensor, str]:
        """The weight of each token of `states` (B, T, D), 0 for padding, as (B, T); and what they are counted in."""
        if is_decoder:
            counted = self.counted(inputs)
            if counted is not None:
                return counted, "prediction"
            # one prediction an example: the decoder reads the text once more
        if "input_ids" not in inputs:  # pixels: an example is the mean of its patches
            return torch.full(states.shape[:2], 1 / states.shape[1], device=states.device), "example"
        mask = inputs.get("attention_mask")
        return torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask.bool(), "token"

    def logits(self, outputs, inputs: dict) -> Tensor:
        """The logits that count: (items, C). Spans give 2 * B rows over the T real tokens.

        One number an example, (B,), is one class: DeBERTa gives it where there are labels, and (B, 1) where not.
        """
        if self.kind == "spans":
            logits = torch.cat([outputs["start_logits"], outputs["end_logits"]])  # (2 * B, T)
            mask = inputs.get("attention_mask")
            # Not -inf: the same huge negative number in student and teacher has probability and distance zero.
            return logits if mask is None else logits.masked_fill(~mask.bool().repeat(2, 1), -1e4)
        logits = outputs["logits"]
        if (counted := self.counted(inputs)) is None:
            return logits[:, None] if logits.ndim == 1 else logits
        return (logits[:, : counted.shape[1]] if self.is_shifted else logits)[counted]

    def labels(self, inputs: dict) -> Tensor:
        """The labels of the tokens that count, (items,), in the order of `logits`."""
        counted = self.counted(inputs)
        return inputs["labels"][:, -counted.shape[1] :][counted]

    def count(self, inputs: dict) -> dict[str, Tensor]:
        """How many items of each unit of `losses.Unit` there are in a batch, as float tensors."""
        first = next(v for v in inputs.values() if isinstance(v, Tensor))
        ids, mask, counted = inputs.get("input_ids"), inputs.get("attention_mask"), self.counted(inputs)
        rows = len(first) if ids is None else ids.flatten(0, -2).shape[0]  # several choices are rows of their own
        predictions = len(first) if counted is None else counted.sum()
        counts = {
            "example": rows,
            "token": mask.sum() if mask is not None else rows if ids is None else ids.numel(),
            "label": self._count_labels(inputs, predictions),
            "prediction": predictions,
        }
        return {unit: torch.as_tensor(count, device=first.device).float() for unit, count in counts.items()}

    def _count_labels(self, inputs: dict, predictions: Tensor | int) -> Tensor | int:
        if self.kind == "spans" and "start_positions" in inputs and "input_ids" in inputs:
            T = inputs["input_ids"].shape[1]
            return sum((inputs[f"{side}_positions"] < T).sum() for side in ("start", "end")) / 2
        labels = inputs.get("labels")
        if self.kind == "sequence" and labels is not None and labels.ndim == 1 and not labels.is_floating_point():
            return (labels != -100).sum()
        return predictions
