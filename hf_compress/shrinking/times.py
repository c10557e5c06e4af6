"""Measures what layers, heads and neurons cost in a runtime on this machine: four structures of the model, in turns.

They take about the time that is wanted: a model that fits a processor's caches has layers of half the time of one that
does not. Where the runtime takes integers, the whole one is also timed with one range for the inputs of each layer:
what is faster stays.
"""

import copy
import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.files.whole import write_whole
from hf_compress.formats.export import RUNTIMES, installed
from hf_compress.formats.runtimes.opened import open_exported
from hf_compress.measuring.measure import device_name, evaluating, versions
from hf_compress.measuring.timing import Spread, time_interleaved
from hf_compress.model.anatomy import anatomy, out_features
from hf_compress.model.inputs import example_batch
from hf_compress.model.precision import CAP
from hf_compress.pruning.targets import StructureTimes
from hf_compress.quantization.quantize import quantize
from hf_compress.recipe.fingerprints import digest
from hf_compress.recipe.quantizing import linear_maps
from hf_compress.shrinking.wish import Wish
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons

logger = logging.getLogger(__name__)

Shape = tuple[int | None, float, float]  # layers (None: all), share of the heads of each, of the neurons
WHOLE: Shape = (None, 1.0, 1.0)
ROUNDS = 30
WORTH = 0.95  # of the time: what ranges must save to be trained
THINNEST = 1 / 8  # of a layer's heads and neurons: with less nothing is left that could learn
ROWS = {"group_size": -1, "symmetric": True, "embedding_bits": 8}  # of the 8-bit model that will be served


@dataclass(frozen=True)
class MeasuredTimes:
    """original: milliseconds of one text in the model as it is, in PyTorch; `structure` and `whole`, all layers in
    8 bit, in the runtime; has_ranges: with one range for the inputs of each layer, which is faster there."""

    original: float
    structure: StructureTimes
    machine: str
    has_ranges: bool = False
    whole: float | None = None


def measured_times(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    runtime: str,
    *,
    tokens: int,
    ranges: bool = False,
    wish: Wish | None = None,
) -> MeasuredTimes:
    """The times of 8-bit structures of `model` in `runtime`, kept for this machine, its threads and versions.

    ranges  the inputs of layers may have one range each, where that is faster
    wish    for a time: structures of about that are measured; by default the whole model and parts of it
    """
    capped = f", {CAP}={os.environ[CAP]}" if CAP in os.environ else ""
    threads = torch.get_num_threads()
    machine = f"{device_name(torch.device('cpu'))}, {threads} thread{'s' * (threads != 1)}{capped}"
    of = {
        "config": model.config.to_dict(),
        "class": type(model).__name__,
        "runtime": runtime,
        "tokens": tokens,
        "ranges": ranges,
        "wish": asdict(wish) if wish else None,
        "machine": machine,
        **versions(),
    }
    file = Path(constants.HF_HOME) / "hf_compress" / "times" / f"{digest(of)}.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return MeasuredTimes(**kept | {"structure": StructureTimes(**kept["structure"])})
    with tempfile.TemporaryDirectory() as place:
        times = _measure(_Runtime(runtime, tokenizer, tokens, Path(place)), model, ranges, machine, wish)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(times), indent=1))
    return times


def _measure(runtime: "_Runtime", model: PreTrainedModel, ranges: bool, machine: str,
             wish: Wish | None = None) -> MeasuredTimes:  # fmt: skip
    depth, attentions = len(anatomy(model).layers), anatomy(model).attentions
    groups = attentions[0].num_key_value_heads if attentions else 1
    if depth == 1:
        raise ValueError(f"{type(model).__name__} has one layer: there is nothing to choose between.")
    original, whole, has_ranges = _whole(runtime, model, ranges and runtime.is_exported)
    shapes = shapes_near(1.0 if wish is None else wish.milliseconds(original) / whole, depth, groups)
    served = [runtime.served(model, shape, ranges=has_ranges) for shape in shapes]
    original, *times = runtime.milliseconds([model, *served])
    return MeasuredTimes(original, solved(shapes, times), machine, has_ranges, whole)


def _whole(runtime: "_Runtime", model: PreTrainedModel, ranges: bool) -> tuple[float, float, bool]:
    """Milliseconds of `model` in PyTorch and in the runtime, and whether there its inputs in one range each save time,
    where they may have them."""
    served = []
    for has_ranges in (False, True)[: 1 + ranges]:
        try:
            served.append(runtime.served(model, WHOLE, ranges=has_ranges))
        except ValueError as error:  # a layer that these inputs do not reach, or values that 8 bits do not hold
            if not has_ranges:
                raise
            logger.warning("inputs stay without ranges: %s", error)
    original, each, *one = runtime.milliseconds([model, *served])
    return (original, one[0], True) if one and one[0] <= WORTH * each else (original, each, False)


@dataclass
class _Runtime:
    """Where structures run: opened from `place`, where that is not PyTorch."""

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    tokens: int
    place: Path
    number: int = 0

    @property
    def is_exported(self) -> bool:
        return self.name in RUNTIMES

    def served(self, model: PreTrainedModel, shape: Shape, *, ranges: bool) -> Any:
        layers = "all layers" if shape[0] is None else f"{shape[0]} layer{'s' * (shape[0] > 1)}"
        logger.warning("measuring %s, %.0f%% of heads, %.0f%% of neurons in %s%s",
                       layers, 100 * shape[1], 100 * shape[2], self.name, ", inputs in one range" * ranges)  # fmt: skip
        small = cut_evenly(model, *shape)
        made = packed(small, calibration=[example_batch(small, sequence_length=self.tokens)] if ranges else None)
        if not self.is_exported:
            return made
        self.number += 1
        folder = self.place / str(self.number)
        # what such a model answers is chance, and may hang on a rounding
        installed(self.name).write(made, folder, tokenizer=self.tokenizer, calibration=None, bound=math.inf)
        return open_exported(folder)

    def milliseconds(self, models: list[Any]) -> list[float]:
        """Of one text, in turns: the fastest tenth. A machine at work slows some rounds of one structure down, and
        differences are what counts. The first is a model in PyTorch."""
        batch = {name: value[:1] for name, value in example_batch(models[0], sequence_length=self.tokens).items()}
        with evaluating(models), torch.inference_mode():
            seconds = time_interleaved([partial(one, **batch) for one in models], rounds=ROUNDS, steady=True)
        return [1e3 * Spread.of(times).low for times in seconds]


def shapes_near(share: float, depth: int, groups: int) -> list[Shape]:
    """Four shapes of about `share` of the time of a whole model, of `depth` layers with `groups` of heads each: whole
    layers, another number of layers, fewer heads, fewer neurons."""

    def of_heads(share: float) -> float:
        return (round(groups * share) or 1) / groups

    number = min(max(round(depth * share), 1), depth)
    thin = max(share, THINNEST)
    other = (depth, of_heads(thin), thin) if number < depth else (max(1, depth // 3), 1.0, 1.0)
    return [(number, 1.0, 1.0), other, (number, of_heads(0.5), 1.0), (number, 1.0, 0.5)]


def solved(shapes: list[Shape], times: list[float]) -> StructureTimes:
    """The parts of the times of shapes: so many whole layers, another number of layers, thinner ones or not, the first
    with fewer heads, the first with fewer neurons. What noise would make negative is 0."""
    (number, _, _), (others, heads, neurons), (_, few, _), (_, _, half) = shapes
    first, second, narrow, thin = times
    of_heads = max((first - narrow) / (number * (1 - few)), 0.0) if few < 1 else 0.0
    of_neurons = max((first - thin) / (number * (1 - half)), 0.0)
    saved = others * ((1 - heads) * of_heads + (1 - neurons) * of_neurons)  # by thinner layers
    layer = min(max((first - second - saved) / (number - others), 0.0), first / number)
    of_heads = min(of_heads, layer)
    of_neurons = min(of_neurons, layer - of_heads)
    return StructureTimes(first - number * layer, of_heads, of_neurons, layer - of_heads - of_neurons)


def cut_evenly(model: PreTrainedModel, layers: int | None, heads: float, neurons: float) -> PreTrainedModel:
    """A copy with the first layers, and of each the first heads and neurons: speed does not mind which."""
    small = copy.deepcopy(model)
    if layers is not None:
        prune_layers(small, keep=range(layers))
    for number, attention in enumerate(anatomy(small).attentions):
        groups = attention.num_key_value_heads
        gone = range(round(groups * heads) or 1, groups)
        members = attention.num_heads // groups
        prune_heads(small, {number: [group * members + i for group in gone for i in range(members)]})
    for number, layer in enumerate(anatomy(small).layers):
        width = out_features(layer.feed_forward.inputs[0]) // (2 if layer.feed_forward.is_fused else 1)
        prune_neurons(small, {number: range(round(width * neurons) or 1, width)})
    return small


def packed(model: PreTrainedModel, *, calibration: list | None = None) -> PreTrainedModel:
    """In 8 bit, as it will be served; with `calibration`, inputs of a layer in the one range that they have there."""
    ranges = (
        {} if calibration is None else {"activation_bits": 8, "static_activations": True, "calibration": calibration}
    )
    return quantize(model, linear_maps(model, 8), **ROWS, **ranges)
