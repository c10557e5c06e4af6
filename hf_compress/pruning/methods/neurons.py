"""Neuron pruning: while a model trains, the feed-forward neurons that matter least fall silent, and are cut in the end.

Prasanna et al., 2020, https://arxiv.org/abs/2005.00561

    importance of a neuron = mean over examples of |d loss / d gate|
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy, module_names, out_features
from hf_compress.pruning.callback import Pruning, per_matrix_importance
from hf_compress.pruning.masks import Blocks
from hf_compress.pruning.methods.heads import unit_score
from hf_compress.pruning.scores import Given
from hf_compress.pruning.trainer import PruningConfig, PruningTrainer

SCOPES = {"model": "class-blind", "layer": "class-uniform"}


class NeuronPruning(Pruning):
    """Callback for any `Trainer`: masks a growing share of the feed-forward neurons.

    Args:
        importance: `gradient` of the training loss, gathered since the last update; `random`; or a tensor (L, F) from
            `hfc.neuron_importance`.
        scope: whether the share is one of the whole `model`, or of each `layer`, which keeps widths equal.
        sparsity, schedule, begin, end, num_updates, regrow: see `Pruning`.
    """

    name = "neuron_pruning"

    def __init__(
        self, sparsity: float = 0.5, *, importance: str | Tensor = "gradient", scope: str = "model", **options
    ):
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}.")
        self.scope = SCOPES[scope]
        super().__init__(sparsity, score=unit_score(importance, normalize=False), **options)

    def matrices(self, model: nn.Module) -> list[Blocks]:
        names = module_names(model)
        outputs = [layer.feed_forward.output for layer in anatomy(model).layers if layer.feed_forward.num_neurons]
        found = [Blocks(names[output], output, (out_features(output), 1)) for output in outputs]
        if isinstance(self.score, Given):
            per_matrix_importance(self.score.importance, found, "neurons")
        return found


@dataclass
class NeuronPruningConfig(PruningConfig):
    sparsity: float = field(default=0.5, metadata={"help": "Share of the neurons that go, at least 0 and below 1."})
    importance: str = field(
        default="gradient", metadata={"help": "`gradient` of the loss with respect to a neuron's gate, or `random`."}
    )
    scope: str = field(
        default="model", metadata={"help": "The share is one of the whole `model`, or of each `layer` (equal widths)."}
    )

    callback_class = NeuronPruning


class NeuronPruningTrainer(PruningTrainer):
    config_class = NeuronPruningConfig
