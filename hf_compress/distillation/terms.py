"""A distillation method as a term: a loss over what a student and its teacher make of a batch, for any trainer.

    trainer = hfc.DistillationTrainer(
        student, args, teacher_model=teacher, terms=[hfc.PatientStates(beta=0.1), hfc.Flows(), hfc.Hints(hints="2:4")]
    )

Each method has a term, its settings, and a trainer that uses it alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from accelerate import Accelerator
from torch import Tensor, nn

from hf_compress.distillation.layer_map import first_decoder_state
from hf_compress.distillation.losses.sums import Loss, Unit
from hf_compress.distillation.runs import Run
from hf_compress.model.tasks import Task
from hf_compress.training.state import TrainingState

Signals = Mapping[str, Iterable[int]]  # which `attention` and `hidden_states` to capture


@dataclass
class TermOptions:
    """The settings of a term; a trainer's config has them among its own. Subclasses check them in `__post_init__`."""

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):  # of the config
            super().__post_init__()


class Term:
    """One loss, or a few that belong together, over the inner layers of both models.

    Args:
        options: an instance of `options_class`, or a config that has its fields; or give the settings by name.

    A term keeps nothing of the student: `bind` decides once which layers it reads, `make_state` what is learned beside
    the student, and `losses` gets both runs of each batch.
    """

    options_class: type[TermOptions] = TermOptions
    name: str  # tells its losses from those of another term
    student_signals: Signals = {}
    teacher_signals: Signals = {}
    needs_graph = False  # whether its losses differentiate the student's run, in evaluation too

    def __init__(self, options: TermOptions | None = None, **given):
        self.options = self.options_class(**given) if options is None else options

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        """Decide on layers and signals. Raises ValueError for two models that the term cannot match."""
        self.task, self.first_decoder_state = Task.of(student), first_decoder_state(student)

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module | Tensor]:
        """What is learned, or kept from step to step, beside the student: by name, for its `TrainingState`."""
        return {}

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        raise NotImplementedError

    def after_step(self, state: TrainingState, accelerator: Accelerator) -> None:
        """Called after each optimiser step, for what follows from all of its batches."""

    def tokens(self, states: Tensor, inputs: Mapping, number: int = 0) -> tuple[Tensor, Unit]:
        """The weights (B, T) of the tokens of the student's hidden state `number`, (B, T, D), and their unit."""
        return self.task.tokens(states, inputs, is_decoder=number >= self.first_decoder_state)


def bind_all(terms: Sequence[Term], student: nn.Module, teacher: nn.Module) -> None:
    """Bind each term to both models. Raises ValueError for two of one kind."""
    for term in terms:
        if not isinstance(term, Term):
            raise TypeError(f"terms are losses such as hfc.PatientStates(), got {term!r:.60}.")
        term.bind(student, teacher)
    names = [term.name for term in terms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"There are two terms of the kind {twice[0]!r}: name all layers in the settings of one.")


def joint_signals(terms: Iterable[Term], who: Literal["student", "teacher"]) -> dict[str, list[int]]:
    """What several terms capture of one model, without what none of them does."""
    layers: dict[str, set[int]] = {}
    for term in terms:
        for kind, numbers in getattr(term, f"{who}_signals").items():
            layers.setdefault(kind, set()).update(numbers)
    return {kind: sorted(numbers) for kind, numbers in layers.items() if numbers}
