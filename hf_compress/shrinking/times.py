"""Measures what layers, heads and neurons cost in a runtime on this machine: four structures of the model, in turns.

Where the runtime takes integers, the whole one also with one range for the inputs of each layer: what is faster stays.
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
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons

logger = logging.getLogger(__name__)

ROUNDS = 30
WORTH = 0.95  # of the time: what ranges must save to be trained
ROWS = {"group_size": -1, "symmetric": True, "embedding_bits": 8}  # of the 8-bit model that will be served


@dataclass(frozen=True)
class MeasuredTimes:
    """original: milliseconds of one text in the model as it is, in PyTorch; `structure` in the runtime; has_ranges:
    with one range for the inputs of each layer, which is faster there."""

    original: float
    structure: StructureTimes
    machine: str
    has_ranges: bool = False


def measured_times(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    runtime: str,
    *,
    tokens: int,
    ranges: bool = False,
) -> MeasuredTimes:
    """The times of 8-bit structures of `model` in `runtime`, kept for this machine, its threads and versions.

    ranges  the inputs of layers may have one range each, where that is faster
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
        "machine": machine,
        **versions(),
    }
    file = Path(constants.HF_HOME) / "hf_compress" / "times" / f"{digest(of)}.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return MeasuredTimes(kept["original"], StructureTimes(**kept["structure"]), machine, kept["has_ranges"])
    with tempfile.TemporaryDirectory() as place:
        times = _measure(_Runtime(runtime, tokenizer, tokens, Path(place)), model, ranges, machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(times), indent=1))
    return times


def _measure(runtime: "_Runtime", model: PreTrainedModel, ranges: bool, machine: str) -> MeasuredTimes:
    depth = len(anatomy(model).layers)
    few = max(1, depth // 3)
    shapes = [(depth, 1.0, 1.0), (few, 1.0, 1.0), (depth, 0.5, 1.0), (depth, 1.0, 0.5)]
    if few == depth:
        raise ValueError(f"{type(model).__name__} has one layer: there is nothing to choose between.")
    has_ranges = ranges and runtime.is_exported and _are_faster(runtime, model, shapes[0])
    served = [runtime.served(model, shape, ranges=has_ranges) for shape in shapes]
    original, *times = runtime.milliseconds([model, *served])
    return MeasuredTimes(original, solved(shapes, times), machine, has_ranges)


def _are_faster(runtime: "_Runtime", model: PreTrainedModel, shape: tuple[int, float, float]) -> bool:
    """Whether inputs in one range each save time."""
    try:
        both = [runtime.served(model, shape, ranges=has_ranges) for has_ranges in (False, True)]
    except ValueError as error:  # a layer that these inputs do not reach, or values that 8 bits do not hold
        logger.warning("inputs stay without ranges: %s", error)
        return False
    _, each, one = runtime.milliseconds([model, *both])
    return one <= WORTH * each


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

    def served(self, model: PreTrainedModel, shape: tuple[int, float, float], *, ranges: bool) -> Any:
        logger.warning("measuring %d layer%s, %.0f%% of heads, %.0f%% of neurons in %s%s",
                       shape[0], "s" * (shape[0] > 1), 100 * shape[1], 100 * shape[2], self.name,
                       ", inputs in one range" * ranges)  # fmt: skip
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


def solved(shapes: list[tuple[int, float, float]], times: list[float]) -> StructureTimes:
    """The parts of the times of shapes (layers, share of heads, share of neurons): the whole one, one of fewer layers,
    one of fewer heads, one of fewer neurons. What noise would make negative is 0."""
    (depth, _, _), (few, _, _), (_, heads, _), (_, _, neurons) = shapes
    whole, shallow, narrow, thin = times
    layer = max((whole - shallow) / (depth - few), 0.0)
    of_heads = min(max((whole - narrow) / (depth * (1 - heads)), 0.0), layer)
    of_neurons = min(max((whole - thin) / (depth * (1 - neurons)), 0.0), layer - of_heads)
    return StructureTimes(max(whole - depth * layer, 0.0), of_heads, of_neurons, layer - of_heads - of_neurons)


def cut_evenly(model: PreTrainedModel, layers: int, heads: float, neurons: float) -> PreTrainedModel:
    """A copy with the first layers, and of each the first heads and neurons: speed does not mind which."""
    small = copy.deepcopy(model)
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
