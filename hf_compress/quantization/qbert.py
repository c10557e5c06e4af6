"""Q-BERT: fine-tune an encoder with group-wise quantized weights, the more sensitive modules at more bits.

Shen et al., 2020, https://arxiv.org/abs/1909.05840. Weights 2 to 4 bit in bundles of output rows, embeddings and
activations 8 bit, gradients straight through the rounding. The bits of each module come from its sensitivity (section
3.1) and the exact best choice under a budget (see `allocation`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer

from hf_compress.model.anatomy import anatomy
from hf_compress.model.weights import check_writable
from hf_compress.quantization.allocation import allocate_bits
from hf_compress.quantization.modules import choose_modules
from hf_compress.quantization.qat import FakeQuantized, QuantizationAware, prepare_qat
from hf_compress.quantization.sensitivity import hessian_sensitivity
from hf_compress.training.arguments import CompressionArguments, by_name, checked
from hf_compress.training.state import TrainingStateMixin

logger = logging.getLogger(__name__)


@dataclass
class QBertConfig(CompressionArguments):
    average_bits: float = field(
        default=4.0, metadata={"help": "Size budget: mean bits per quantized weight. A whole 2, 3, 4 or 8 is uniform."}
    )
    num_groups: int = field(
        default=128, metadata={"help": "Weight groups per layer at least; rows of one head stay in one group."}
    )
    embedding_bits: int | None = field(
        default=8, metadata={"help": "Bits of the embedding tables: 2, 3, 4 or 8; 0 leaves them as they are."}
    )
    learned_steps: bool = field(
        default=False, metadata={"help": "Learn the scales with the weights (LSQ) instead of searching them anew."}
    )
    refresh_steps: int = field(default=100, metadata={"help": "Steps between two searches of the weight ranges."})
    start_bits: int | None = field(
        default=None, metadata={"help": "Begin with so many bits and go down to each module's own: 8, 4 or 3."}
    )
    lowering_ratio: float = field(default=0.3, metadata={"help": "Share of the training that lowering the bits takes."})
    sensitivity_examples: int = field(
        default=128, metadata={"help": "Training examples that the sensitivity is estimated on, where bits are mixed."}
    )
    sensitivity_method: str = field(
        default="fisher", metadata={"help": "eigenvalue (Q-BERT), trace (HAWQ-V2), fisher or divergence (measured)."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.embedding_bits = self.embedding_bits or None  # a command line cannot say None
        if not 2 <= self.average_bits <= 8:
            raise ValueError(f"average_bits must lie between 2 and 8, got {self.average_bits}.")
        if self.num_groups < 1 or self.sensitivity_examples < 1:
            raise ValueError(
                f"num_groups and sensitivity_examples must be positive, got {self.num_groups} and "
                f"{self.sensitivity_examples}."
            )


class QBertTrainer(TrainingStateMixin, Trainer):
    """Quantization-aware fine-tuning. After `train()` the model is packed, with the logits of the trained one.

    Args:
        bits: {module name: bits}; by default chosen by sensitivity for `args.average_bits`.
        model: fine-tuned already, which is where Q-BERT starts.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: QBertConfig | None = None,
        *positional,
        bits: Mapping[str, int] | None = None,
        **kwargs,
    ):
        who = type(self).__name__
        super().__init__(model, checked(args, QBertConfig, who), **by_name(positional, kwargs, who))
        self._given_bits, self._callback = bits, None
        self._prepare()

    def _hp_search_setup(self, trial) -> None:
        """A new model of `model_init` is prepared as well, by the settings of its trial."""
        super()._hp_search_setup(trial)
        if not self._is_prepared:
            self._prepare()

    @property
    def _is_prepared(self) -> bool:
        return any(isinstance(module, FakeQuantized) for module in self.model.modules())

    def _prepare(self) -> None:
        args: QBertConfig = self.args
        if not self._is_prepared:
            check_writable(anatomy(self.model), "Q-BERT")
            self.bits = dict(self._given_bits) if self._given_bits is not None else self.choose_bits()
            prepare_qat(self.model, self.bits, num_groups=args.num_groups, embedding_bits=args.embedding_bits,
                        learned_steps=args.learned_steps)  # fmt: skip
        if self._callback is not None:
            self.remove_callback(self._callback)
        self._callback = QuantizationAware(refresh_steps=args.refresh_steps, start_bits=args.start_bits,
                                           lowering_ratio=args.lowering_ratio)  # fmt: skip
        self.add_callback(self._callback)

    def choose_bits(self) -> dict[str, int]:
        """Bits for every linear map of the layers, from their sensitivity on a subsample of the training data."""
        args: QBertConfig = self.args
        if args.average_bits in (2, 3, 4, 8):
            return choose_modules(self.model, int(args.average_bits))
        if isinstance(self.train_dataset, IterableDataset):
            rows = list(islice(self.train_dataset, args.sensitivity_examples))
            collate = self._get_collator_with_removed_columns(self.data_collator)
        else:
            count = min(args.sensitivity_examples, len(self.train_dataset))
            rows, collate = self._remove_unused_columns(self.train_dataset.select(range(count))), self.data_collator
        loader = DataLoader(rows, batch_size=args.train_batch_size, collate_fn=collate)
        sensitivity = hessian_sensitivity(self.model, loader, method=args.sensitivity_method)
        return allocate_bits(self.model, sensitivity, average_bits=args.average_bits, group_size=-1)

    def pack(self) -> nn.Module:
        """`finish()`: the trained model with packed weights, in place; `train` has done so with `finish_at_end`."""
        return self.finish()
