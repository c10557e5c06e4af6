"""Embedders: the student gives each text a vector as its teacher does. No labels are needed.

    loss = vector_weight * (1 - cos(W e_s, e_t)), or |W e_s - e_t|^2 / D
           + similarity_weight * KL(p_t || p_s),    p(j) = softmax over other texts j of cos(e, e_j) / tau

e are pooled last states, W is learned where widths differ. The other texts are those of the micro-batch and of a queue
of the last `queue_size`, each in the model's own space. Vectors: Reimers and Gurevych, 2020,
https://arxiv.org/abs/2004.09813; similarities: Fang et al., 2021, https://arxiv.org/abs/2101.04731
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import num_hidden_states
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.phases import Phase
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.pooling import MODES, Pooling, read_pooling, write_pooling
from hf_compress.model.tasks import plain_model
from hf_compress.training.state import TrainingState


@dataclass
class EmbeddingOptions(TermOptions):
    pooling: str = field(
        default="auto",
        metadata={"help": f"How tokens become a vector: {', '.join(MODES)}; `auto`: as the teacher's folder says."},
    )
    vector_loss: str = field(default="cosine", metadata={"help": "Distance of the vectors: `cosine` or `mse`."})
    vector_weight: float = field(default=1.0, metadata={"help": "Weight of the vectors' distance; 0 leaves it out."})
    similarity_weight: float = field(default=1.0, metadata={"help": "Weight of the similarity loss; 0 leaves it out."})
    similarity_temperature: float = field(default=0.05, metadata={"help": "Divides cosines before softmax; above 0."})
    queue_size: int = field(
        default=0, metadata={"help": "Texts before the batch that the similarity loss compares with as well."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.pooling not in ("auto", *MODES) or self.vector_loss not in ("cosine", "mse"):
            raise ValueError(
                f"pooling must be `auto` or one of {MODES} and vector_loss `cosine` or `mse`, got {self.pooling!r} and "
                f"{self.vector_loss!r}."
            )
        weights = self.vector_weight, self.similarity_weight
        if min(weights) < 0 or not any(weights) or self.similarity_temperature <= 0 or self.queue_size < 0:
            raise ValueError(
                "vector_weight and similarity_weight must be 0 or more, one of them above 0, similarity_temperature "
                f"above 0 and queue_size 0 or more, got {weights}, {self.similarity_temperature}, {self.queue_size}."
            )


def vector_distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """1 - cosine of vectors (B, D), or their squared distance averaged over D; summed over the texts."""
    mine, theirs = exact(student), exact(teacher)
    if kind == "mse":
        return (mine - theirs).square().mean(dim=-1).sum()
    return (1 - F.cosine_similarity(mine, theirs, dim=-1)).sum()


def similarity_loss(
    student: Tensor, teacher: Tensor, temperature: float, others: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """KL of the distributions of cosines from each text (B, D) to all others, those (Q, D) included; summed over texts.

    Widths D are each model's own. A text alone has no others, and no loss.
    """
    logs = []
    for number, vectors in enumerate((student, teacher)):
        x = F.normalize(exact(vectors), dim=-1)
        keys = x if others is None else torch.cat([x, F.normalize(exact(others[number]), dim=-1)])  # (B + Q, D)
        if len(keys) < 2:
            return student.sum() * 0.0
        itself = torch.eye(len(x), len(keys), dtype=torch.bool, device=x.device)
        cosines = (x @ keys.mT)[~itself].view(len(x), -1)  # (B, B + Q - 1)
        logs.append((cosines / temperature).log_softmax(dim=-1))
    return (logs[1].exp() * (logs[1] - logs[0])).sum()


class SentenceVectors(Term):
    """Vectors of whole texts and their similarities. Any two models that read the same tokens."""

    options_class, name = EmbeddingOptions, "sentence"

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        if self.options.pooling == "auto":
            folder = getattr(plain_model(teacher).config, "_name_or_path", "")
            self.pooling = (read_pooling(folder) if folder else None) or Pooling()
        else:
            self.pooling = Pooling(self.options.pooling)
        self.last = num_hidden_states(student) - 1, num_hidden_states(teacher) - 1
        self.student_signals, self.teacher_signals = ({"hidden_states": [number]} for number in self.last)

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module | Tensor]:
        state = {"sentence": projection(student, teacher)} if self.options.vector_weight else {}
        if self.options.similarity_weight and self.options.queue_size:
            for who, model in (("student", student), ("teacher", teacher)):
                width = plain_model(model).config.hidden_size
                state[f"{who}_queue"] = torch.zeros(self.options.queue_size, width)
            state["queued"] = torch.zeros((), dtype=torch.long)  # texts so far
        return state

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        options, mask = self.options, inputs.get("attention_mask")
        runs = zip((student, teacher), self.last, strict=True)
        mine, theirs = (self.pooling(exact(run.hidden_states[number]), mask) for run, number in runs)
        losses = {}
        if options.vector_weight:
            distance = vector_distance(state.sentence(mine), theirs, options.vector_loss)
            losses["vector_loss"] = Loss(distance, "example", options.vector_weight)
        if options.similarity_weight:
            others = self._queue(state)
            loss = similarity_loss(mine, theirs, options.similarity_temperature, others)
            losses["similarity_loss"] = Loss(loss, "example", options.similarity_weight)
            if others is not None and torch.is_grad_enabled():
                self._remember(mine, theirs, state)
        return losses

    def _queue(self, state: TrainingState) -> tuple[Tensor, Tensor] | None:
        if not self.options.queue_size:
            return None
        filled = min(int(state.queued), self.options.queue_size)
        return state.student_queue[:filled].clone(), state.teacher_queue[:filled].clone()

    @torch.no_grad()
    def _remember(self, mine: Tensor, theirs: Tensor, state: TrainingState) -> None:
        """The oldest texts leave. (Under DDP each process goes on with the queue of the first.)"""
        size, B = self.options.queue_size, min(len(mine), self.options.queue_size)
        places = (int(state.queued) + torch.arange(B, device=mine.device)) % size
        state.student_queue[places], state.teacher_queue[places] = mine[-B:].float(), theirs[-B:].float()
        state.queued += B


@dataclass
class EmbeddingDistillationConfig(EmbeddingOptions, DistillationConfig):
    """The settings of the trainer and of its term. `alpha` has no part in it: there are no predictions."""


class EmbeddingDistillationTrainer(DistillationTrainer):
    """Distils an embedder (`AutoModel`) from texts alone.

    What is saved opens in `SentenceTransformer(folder)`: the pooling, a map to the teacher's width where that was
    learned, and vectors of length one if the teacher's are.
    """

    config_class = EmbeddingDistillationConfig

    def make_phases(self) -> list[Phase]:
        return [Phase(1.0, self.own_terms(), predictions=False)]

    def own_terms(self) -> list[Term]:
        return [*super().own_terms(), SentenceVectors(self.args)]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.write_vectors(output_dir or self.args.output_dir)

    def write_vectors(self, folder: str | Path) -> None:
        """Write into a folder with the saved student how its states become a vector."""
        term = next(term for term in self.all_terms if isinstance(term, SentenceVectors))
        dense = getattr(getattr(self.training_state, "sentence", None), "weight", None)
        write_pooling(folder, term.pooling, plain_model(self.model).config.hidden_size, dense)
