"""Scales distilled end to end: a packed model keeps its integers, its scales and norms follow the float model.

    w = s0 (1 + t) (q - z),    loss = KL(p_teacher || p_student) over the whole vocabulary, or the soft loss of a task

t and the weights of norms learn, by Adam at rates relative to their size; of a codebook its levels do, the centroids of
Han et al. (see `layers.trained_levels`). Published for MLX as "distilled weight
quantization" (DWQ), 2025, https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LEARNED_QUANTS.md
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from hf_compress.checkpoint.bits import settle_bits
from hf_compress.distillation.heads import output_head
from hf_compress.distillation.losses.sums import Loss
from hf_compress.distillation.methods.embeddings import SentenceVectors
from hf_compress.distillation.methods.word_level import WordLevelConfig, WordLevelTrainer
from hf_compress.distillation.phases import Phase
from hf_compress.distillation.runs import Run
from hf_compress.distillation.terms import Term
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.packed_embedding import TiedHead
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import SCALE_DTYPES
from hf_compress.layers.trained_scales import train_scales
from hf_compress.model.tasks import LANGUAGE_MODELS, auto_class_name, plain_model
from hf_compress.model.unfinished import check_finished
from hf_compress.model.weights import check_no_adapters
from hf_compress.training.state import TrainingState

SMALLEST_NORM = 1e-2  # mean size of a norm's weights below which their rate falls no further


@dataclass
class ScaleConfig(WordLevelConfig):
    alpha: float = field(
        default=1.0, metadata={"help": "Share of the distance to the teacher; the task loss gets the rest."}
    )
    learning_rate: float = field(
        default=5e-3, metadata={"help": "Of scales, as shares of what they were: 5e-3 at 3 bit and more, 1e-2 at 2."}
    )
    norm_rate: float = field(
        default=0.5,
        metadata={"help": "Rate of a norm's weights, as share of their mean size, beside that of scales; 0: fixed."},
    )
    zero_point_rate: float = field(
        default=0.0,
        metadata={"help": "Steps of the grid that a zero point moves where a scale moves by all it is; 0: fixed."},
    )
    scale_dtype: str | None = field(
        default=None, metadata={"help": "What scales are stored in: float16 or float32; by default as they are."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up; below 1 the share of all steps."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second beta."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradients are cut to this norm; 0: not at all."})

    def __post_init__(self):
        self.scale_dtype = self.scale_dtype or None  # a command line cannot say None
        super().__post_init__()
        if self.frozen_layers:
            raise ValueError(f"Scales and norms learn in all layers: leave frozen_layers={self.frozen_layers} out.")
        if min(self.norm_rate, self.zero_point_rate) < 0:
            raise ValueError(
                f"norm_rate and zero_point_rate must be 0 or more, got {self.norm_rate} and {self.zero_point_rate}."
            )
        if self.scale_dtype not in (None, *SCALE_DTYPES):
            raise ValueError(f"scale_dtype must be one of {sorted(SCALE_DTYPES)} or None, got {self.scale_dtype!r}.")


class ScaleTrainer(WordLevelTrainer):
    """Distils the scales of a packed model (of `quantize` or `load_gptq`), which is an ordinary packed one afterwards.

    Language models follow the teacher at each position, as in `WordLevelTrainer`; classifiers by their soft loss;
    embedders (`AutoModel`) by the vectors of texts. What learns are scales, zero points where asked for, the levels of
    codebooks, and norms. A model that `finish` has packed, pruned or not, will do. What is evaluated on the way is what
    would be stored.

    Raises ValueError, before the teacher is loaded, for a model without packed layers or with float blocks, for a
    teacher with another vocabulary, and for texts of fewer tokens than the widest layer has columns.
    """

    config_class = ScaleConfig

    def __init__(self, model=None, *positional, **kwargs):
        super().__init__(_trainable(model), *positional, **kwargs)

    def call_model_init(self, trial=None) -> nn.Module:
        return _trainable(super().call_model_init(trial))

    # Which trainer's losses

    @property
    def _losses_of(self) -> type[DistillationTrainer]:
        return WordLevelTrainer if auto_class_name(self.model) in LANGUAGE_MODELS else DistillationTrainer

    @property
    def _is_embedder(self) -> bool:
        return auto_class_name(self.model) == "AutoModel"

    @property
    def needs_logits(self) -> bool:
        return self._losses_of is DistillationTrainer and DistillationTrainer.needs_logits.fget(self)

    def own_terms(self) -> list[Term]:
        given = any(isinstance(term, SentenceVectors) for term in self._given[0])
        return [*super().own_terms(), *([SentenceVectors()] if self._is_embedder and not given else [])]

    def make_phases(self) -> list[Phase]:
        return [Phase(1.0, self.own_terms(), predictions=not self._is_embedder)]

    def check_layers(self) -> None:
        self._losses_of.check_layers(self)

    def takes_head(self, head: nn.Module) -> bool:
        fixed = TiedHead, PackedLinear, CodebookLinear  # as heads they do not learn
        return super().takes_head(head) or isinstance(head, fixed)

    def student_inputs(self, student: nn.Module, inputs: dict) -> dict:
        return self._losses_of.student_inputs(self, student, inputs)

    def compute_loss(self, *args, **kwargs):
        return self._losses_of.compute_loss(self, *args, **kwargs)

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        return self._losses_of.distillation_losses(self, student, teacher, inputs)

    def prediction_step(self, *args, **kwargs):
        return self._losses_of.prediction_step(self, *args, **kwargs)

    # What learns

    def check_student(self, student: nn.Module) -> None:
        check_no_adapters(student)
        check_finished(student, type(self).__name__)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{type(self).__name__} needs whole layers in each process: use DDP, not FSDP or DeepSpeed."
            )
        blocks = [name for name, module in student.named_modules() if isinstance(module, BlockSparseLinear)]
        if blocks:
            raise ValueError(
                f"{type(self).__name__} trains scales, but {blocks[0]}{' and others' * (len(blocks) > 1)} is a "
                "BlockSparseLinear, which has none. Pack blocks by `finish`."
            )
        layers = [module for module in student.modules() if isinstance(module, (PackedLinear, CodebookLinear))]
        if not layers:
            raise ValueError(
                f"{type(student).__name__} has no packed linear layer whose scales could be trained: quantize it first "
                "by hfc.quantize(model, bits=3, ...), or open it by hfc.load_gptq."
            )
        check_amount(self.train_dataset, max(layer.in_features for layer in layers))

    def make_training_state(self, model: nn.Module) -> TrainingState:
        state, plain, args = super().make_training_state(model), plain_model(model), self.args
        is_chunked = self._losses_of is WordLevelTrainer
        options = {"scale_dtype": args.scale_dtype, "zero_point_rate": args.zero_point_rate}
        forms = train_scales(plain, skip=[output_head(plain)] if is_chunked else [], **options)
        settle_bits(plain)  # the dtype of scales is in the record: a checkpoint is a model of its own
        self._frozen = [p for p in plain.parameters() if p.requires_grad]
        plain.requires_grad_(False)
        for weight in norm_weights(plain) if args.norm_rate else ():
            weight.requires_grad_()
        for name, form in forms.items():
            state.add(name.replace(".", "__"), form)
        return state

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        is_own = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_own:
            rate = self.args.learning_rate * self.args.norm_rate
            sizes = {p: max(float(p.detach().abs().mean()), SMALLEST_NORM) for p in norm_weights(self.model)}
            give_rates(optimizer, {p: rate * size for p, size in sizes.items() if p.requires_grad})
        return optimizer

    def finish(self) -> nn.Module:
        model = super().finish()
        for parameter in self._frozen:
            parameter.requires_grad_()
        return model


def _trainable(model: nn.Module | None) -> nn.Module | None:
    """`model`, of which `Trainer` is told that it learns, packed as it is."""
    if hasattr(getattr(model, "hf_quantizer", None), "trains_scales"):
        model.hf_quantizer.trains_scales = True
    return model


def norm_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights (D,) of norms: nothing else is called `weight` and has one dimension."""
    found = (module._parameters.get("weight") for module in model.modules())
    return [weight for weight in found if weight is not None and weight.ndim == 1]


def give_rates(optimizer: torch.optim.Optimizer, rates: dict[nn.Parameter, float]) -> None:
    """Changes `optimizer`: each parameter of `rates` gets a group of its own, which learns at that rate."""
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in rates]
        group["params"] = [parameter for parameter in group["params"] if parameter not in rates]
        for parameter in own:
            optimizer.add_param_group({**group, "params": [parameter], "lr": rates[parameter]})


def check_amount(dataset, columns: int) -> None:
    """Raise ValueError for texts of fewer tokens than `columns`; what cannot be counted beforehand is not."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return
    tokens = 0
    for number in range(len(dataset)):
        row = dataset[number]
        if "input_ids" not in row:
            return
        tokens += int(torch.as_tensor(row.get("attention_mask", torch.ones(len(row["input_ids"])))).sum())
        if tokens >= columns:
            return
    raise ValueError(
        f"The texts are too short: {tokens} tokens, fewer than the {columns} columns of the widest packed layer, would "
        "be learned by heart. Give at least that many, better some 100,000 of general text."
    )
