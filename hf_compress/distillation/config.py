"""The settings that all distillation trainers have."""

from dataclasses import dataclass, field

from hf_compress.distillation.methods.hints import HintOptions
from hf_compress.training.arguments import CompressionArguments

PREDICTION_LOSSES = ("auto", "soft", "logits")


@dataclass
class DistillationConfig(HintOptions, CompressionArguments):
    alpha: float = field(default=0.5, metadata={"help": "Share of the soft loss, 0 to 1; the task loss gets the rest."})
    temperature: float = field(default=2.0, metadata={"help": "Divides the logits before softmax; above 0."})
    prediction_loss: str = field(
        default="auto",
        metadata={
            "help": "Distance to the teacher's logits: `soft` (KL of softened probabilities), `logits` (squared "
            "distance), `auto` (soft, but logits for regression)."
        },
    )
    teacher_noise: float = field(default=0.0, metadata={"help": "Sigma of noise on the teacher's logits; 0 for none."})
    teacher_noise_share: float = field(default=0.5, metadata={"help": "Share of examples that get noise, 0 to 1."})
    teacher_noise_form: str = field(
        default="relative", metadata={"help": "`relative` for (1 + noise) * logits, `additive` for logits + noise."}
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Shares of several teachers in their mean, one each; equal when not given."}
    )
    frozen_layers: int = field(
        default=0, metadata={"help": "So many layers, from below, do not learn, nor the embeddings; 0: all learn."}
    )
    teacher_bits: int | None = field(
        default=None, metadata={"help": "Load a teacher given by name in 8 or 4 bits through bitsandbytes."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the share of the soft loss and must lie between 0 and 1, got {self.alpha}.")
        if self.frozen_layers < 0:
            raise ValueError(f"frozen_layers is a number of layers from below, 0 or more, got {self.frozen_layers}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}. Usual values are 1 to 20.")
        if self.prediction_loss not in PREDICTION_LOSSES:
            raise ValueError(f"prediction_loss must be one of {PREDICTION_LOSSES}, got {self.prediction_loss!r}.")
        if self.teacher_noise < 0 or not 0 <= self.teacher_noise_share <= 1:
            raise ValueError(
                "teacher_noise must be 0 or more and teacher_noise_share between 0 and 1, got "
                f"{self.teacher_noise} and {self.teacher_noise_share}."
            )
        if self.teacher_noise_form not in ("relative", "additive"):
            raise ValueError(f"teacher_noise_form must be `relative` or `additive`, got {self.teacher_noise_form!r}.")
        if self.teacher_bits not in (None, 8, 4):
            raise ValueError(f"teacher_bits must be 8, 4 or None, got {self.teacher_bits}.")
