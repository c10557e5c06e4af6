"""What all our trainers can be told."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class CompressionArguments(TrainingArguments):
    """Arguments of `Trainer`, and whether the training ends in the finished model."""

    finish_at_end: bool = field(
        default=True,
        metadata={
            "help": "Finish the model at the end of train(): cut what fell silent, pack what was rounded. Without it, "
            "`trainer.finish()` does so."
        },
    )
