"""Methods that change a model without training it, as dataclasses of options with `apply`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.budget import prune, share_that_goes
from hf_compress.pruning.embeddings import factorise_embeddings
from hf_compress.pruning.importance import every_other, head_importance, neuron_importance
from hf_compress.pruning.low_rank import factorise
from hf_compress.pruning.one_shot import prune_weights
from hf_compress.pruning.targets import StructureTimes, prune_to_size, prune_to_time
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons
from hf_compress.surgery.merging import merge_neurons
from hf_compress.surgery.tokenizer import used_tokens
from hf_compress.surgery.vocabulary import prune_vocabulary

LAYERS_HELP = "So many stay, evenly spaced, and the same share of each; none: worth over cost decides."


@dataclass(frozen=True)
class Samples:
    """The training data, as one-shot methods use it."""

    texts: Iterable[str]
    rows: Any  # a tokenized `datasets.Dataset`
    collator: Any
    seed: int

    def some(self, number: int) -> Any:
        return self.rows.shuffle(seed=self.seed).select(range(min(number, len(self.rows))))

    def loader(self, number: int, batch_size: int) -> DataLoader:
        return DataLoader(self.some(number), batch_size=batch_size, collate_fn=self.collator)


@dataclass
class StructureOptions:
    """Cut a share of the layers, heads and neurons at once, those that matter least."""

    layers: float = field(default=0.0, metadata={"help": "Share of the layers that goes, evenly spread, 0 to 1."})
    heads: float = field(default=0.0, metadata={"help": "Share of each layer's heads that goes, 0 to below 1."})
    neurons: float = field(default=0.0, metadata={"help": "Share of each layer's neurons that goes, 0 to below 1."})
    head_score: Literal["gradient", "confidence"] = field(
        default="gradient", metadata={"help": "By which heads go: gradient or confidence."}
    )
    neuron_score: Literal["gradient", "entropy", "output_norm", "input_norm", "merging"] = field(
        default="gradient",
        metadata={"help": "By which neurons go: gradient, entropy, output_norm, input_norm; merging adds those that go "
                          "to their likes."},
    )  # fmt: skip
    scoring_examples: int = field(default=256, metadata={"help": "Training examples that importance is measured on."})
    scoring_batch_size: int = field(default=32, metadata={"help": "Examples that are scored at once."})

    def __post_init__(self):
        for name in ("layers", "heads", "neurons"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is the share that goes, at least 0 and below 1, got {getattr(self, name)}.")
        if not (self.layers or self.heads or self.neurons):
            raise ValueError("give a share of layers, heads or neurons that goes.")
        for share, score in (("heads", self.head_score), ("neurons", self.neuron_score)):
            if score != "gradient" and not getattr(self, share):
                raise ValueError(f"{share[:-1]}_score={score} scores nothing: give the share of {share} that goes.")

    @property
    def needs_texts(self) -> bool:
        return bool(self.heads) or bool(self.neurons) and self.neuron_score in ("gradient", "entropy")

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        parts = anatomy(model)
        if self.layers and len(parts.stacks) > 1:
            raise ValueError("layers: a model with encoder and decoder is cut with the method `layers`, which trains.")
        keep = every_other(len(parts.layers), self.layers) if self.layers else range(len(parts.layers))
        merges = self.neuron_score == "merging"
        loader = samples.loader(self.scoring_examples, self.scoring_batch_size) if self.needs_texts else None
        heads = neurons = None  # scores are those of the whole model
        if self.heads:
            heads = head_importance(model, loader, method=self.head_score)
        if self.neurons and not merges:
            neurons = neuron_importance(model, loader, method=self.neuron_score)
        if self.layers:
            prune_layers(model, keep)
        if heads is not None:
            prune_heads(model, self._least(heads, keep, self.heads))
        if neurons is not None:
            prune_neurons(model, self._least(neurons, keep, self.neurons))
        elif self.neurons:
            widths = [layer.feed_forward.num_neurons for layer in anatomy(model).layers]
            merge_neurons(model, {i: int(self.neurons * width) for i, width in enumerate(widths)})
        return model, tokenizer

    @staticmethod
    def _least(scores: Tensor, keep: Iterable[int], share: float) -> dict[int, list[int]]:
        gone = {}
        for new, old in enumerate(keep):
            known = scores[old][~scores[old].isnan()]
            gone[new] = known.argsort(stable=True)[: int(share * len(known))].tolist()
        return gone


@dataclass
class VocabularyOptions:
    """Cut the tokens that the training texts do not need; other words are spelled in smaller pieces."""

    min_count: int = field(default=1, metadata={"help": "Keep tokens that occur at least so often in the data."})

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        keep = used_tokens(tokenizer, samples.texts, min_count=self.min_count)
        return model, prune_vocabulary(model, tokenizer, keep=keep)


@dataclass
class EmbeddingOptions:
    """Write the table of tokens as a product of two thin matrices."""

    rank: int = field(metadata={"help": "Width between the two matrices."})

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        return factorise_embeddings(model, self.rank), tokenizer


@dataclass
class LowRankOptions:
    """Write the linear maps of the layers as products of two thin matrices; say one of the three."""

    rank: int | None = field(default=None, metadata={"help": "Width between the two matrices of each map."})
    energy: float | None = field(default=None, metadata={"help": "Share of each map's squared values that stays."})
    budget: float | None = field(default=None, metadata={"help": "Share of the maps' weights that may stay."})
    shared: bool = field(default=False, metadata={"help": "One projection for maps that share an input."})

    needs_texts = False

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        return factorise(model, rank=self.rank, energy=self.energy, budget=self.budget, shared=self.shared), tokenizer


@dataclass
class BudgetOptions:
    """Cut heads, neurons and layers, those first that are worth least for what they cost."""

    sparsity: float | None = field(default=None, metadata={"help": "Share of the metric that goes, between 0 and 1."})
    metric: Literal["parameters", "multiply_adds", "latency"] = field(
        default="parameters", metadata={"help": "parameters, multiply_adds or latency."}
    )
    sequence_length: int = field(default=128, metadata={"help": "Tokens of the example that costs are counted on."})
    num_layers: int | None = field(default=None, metadata={"help": LAYERS_HELP})
    scoring_examples: int = field(default=256, metadata={"help": "Training examples that importance is measured on."})
    scoring_batch_size: int = field(default=32, metadata={"help": "Examples that are scored at once."})
    target: float | None = field(default=None, metadata={"help": "Share that is left; say sparsity, target will go."})

    def __post_init__(self):
        self.sparsity, self.target = share_that_goes(self.sparsity, self.target), None

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        loader = samples.loader(self.scoring_examples, self.scoring_batch_size)
        prune(model, loader, sparsity=self.sparsity, metric=self.metric, sequence_length=self.sequence_length,
              num_layers=self.num_layers)  # fmt: skip
        return model, tokenizer


@dataclass
class TimeOptions:
    """Cut heads, neurons and layers, those first that are worth least for their time, until a text takes no more."""

    milliseconds: float = field(metadata={"help": "Of one text, in the runtime that the times are of."})
    fixed: float = field(default=0.0, metadata={"help": "Milliseconds of all that is not in the layers."})
    heads: float = field(default=0.0, metadata={"help": "Milliseconds of all heads of a whole layer."})
    neurons: float = field(default=0.0, metadata={"help": "Milliseconds of all neurons of a whole layer."})
    rest: float = field(default=0.0, metadata={"help": "Milliseconds of a layer without heads and neurons."})
    num_layers: int | None = field(default=None, metadata={"help": LAYERS_HELP})
    scoring_examples: int = field(default=128, metadata={"help": "Training examples that importance is measured on."})
    scoring_batch_size: int = field(default=32, metadata={"help": "Examples that are scored at once."})

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        times = StructureTimes(self.fixed, self.heads, self.neurons, self.rest)
        loader = samples.loader(self.scoring_examples, self.scoring_batch_size)
        return prune_to_time(model, loader, times, self.milliseconds, self.num_layers), tokenizer


@dataclass
class SizeOptions:
    """Cut heads, neurons and layers, those first that are worth least for their bytes, until the weights are small."""

    megabytes: float = field(metadata={"help": "Of the weights, once they are stored in so many bits."})
    bits: int = field(default=8, metadata={"help": "Bits that the weights will have."})
    embedding_bits: int = field(default=8, metadata={"help": "Bits that the tables of tokens will have."})
    num_layers: int | None = field(default=None, metadata={"help": LAYERS_HELP})
    scoring_examples: int = field(default=128, metadata={"help": "Training examples that importance is measured on."})
    scoring_batch_size: int = field(default=32, metadata={"help": "Examples that are scored at once."})

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        rows = samples.loader(self.scoring_examples, self.scoring_batch_size)
        prune_to_size(
            model, rows, self.megabytes, bits=self.bits, embedding_bits=self.embedding_bits, num_layers=self.num_layers
        )
        return model, tokenizer


@dataclass
class WeightsOptions:
    """Set single weights to zero without training; such a model is masked, not smaller."""

    sparsity: float = field(default=0.5, metadata={"help": "Share of the weights that go, at least 0 and below 1."})
    score: str = field(default="wanda", metadata={"help": "magnitude, wanda, obd or obs."})
    bank_size: int | None = field(default=None, metadata={"help": "Decide among so many weights of a row; 4 for 2:4."})
    calibration_examples: int = field(default=128, metadata={"help": "Training examples that are run to score."})

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples):
        calibration = None if self.score == "magnitude" else samples.some(self.calibration_examples)
        prune_weights(model, self.sparsity, method=self.score, calibration=calibration, bank_size=self.bank_size)
        return model, tokenizer


PRUNE = {
    "structure": StructureOptions,
    "vocabulary": VocabularyOptions,
    "embeddings": EmbeddingOptions,
    "low-rank": LowRankOptions,
    "budget": BudgetOptions,
    "time": TimeOptions,
    "size": SizeOptions,
    "weights-at-once": WeightsOptions,
}
