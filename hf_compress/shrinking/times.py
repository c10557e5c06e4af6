"""Measures what layers, heads and neurons cost in a runtime on this machine: four structures of the model, in turns."""

import copy
import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

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
ROWS = {"group_size": -1, "symmetric": True, "embedding_bits": 8}  # of the 8-bit model that will be served


@dataclass(frozen=True)
class MeasuredTimes:
    """original: milliseconds of one text in the model as it is, in PyTorch; `structure` in the runtime."""

    original: float
    structure: StructureTimes
    machine: str


def measured_times(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, runtime: str, *, tokens: int
) -> MeasuredTimes:
    """The times of 8-bit structures of `model` in `runtime`, kept for this machine, its threads and versions."""
    capped = f", {CAP}={os.environ[CAP]}" if CAP in os.environ else ""
    threads = torch.get_num_threads()
    machine = f"{device_name(torch.device('cpu'))}, {threads} thread{'s' * (threads != 1)}{capped}"
    of = {
        "config": model.config.to_dict(),
        "class": type(model).__name__,
        "runtime": runtime,
        "tokens": tokens,
        "machine": machine,
        **versions(),
    }
    file = Path(constants.HF_HOME) / "hf_compress" / "times" / f"{digest(of)}.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return MeasuredTimes(kept["original"], StructureTimes(**kept["structure"]), machine)
    times = _measure(model, tokenizer, runtime, tokens, machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(times), indent=1))
    return times


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, runtime: str, tokens: int, machine: str
) -> MeasuredTimes:
    depth = len(anatomy(model).layers)
    few = max(1, depth // 3)
    shapes = [(depth, 1.0, 1.0), (few, 1.0, 1.0), (depth, 0.5, 1.0), (depth, 1.0, 0.5)]
    if few == depth:
        raise ValueError(f"{type(model).__name__} has one layer: there is nothing to choose between.")
    batch = {name: value[:1] for name, value in example_batch(model, sequence_length=tokens).items()}
    with tempfile.TemporaryDirectory() as place:
        models = [model]
        for number, shape in enumerate(shapes):
            logger.warning("measuring %d layer%s, %.0f%% of heads, %.0f%% of neurons in %s",
                           shape[0], "s" * (shape[0] > 1), 100 * shape[1], 100 * shape[2], runtime)  # fmt: skip
            served = packed(cut_evenly(model, *shape))
            if runtime in RUNTIMES:
                folder = Path(place) / str(number)
                # what such a model answers is chance, and may hang on a rounding
                installed(runtime).write(served, folder, tokenizer=tokenizer, calibration=None, bound=math.inf)
                served = open_exported(folder)
            models.append(served)
        with evaluating(models), torch.inference_mode():
            seconds = time_interleaved([partial(one, **batch) for one in models], rounds=ROUNDS, steady=True)
    # The fastest tenth: a machine at work slows some rounds of one structure down, and differences are what counts.
    original, whole, shallow, narrow, thin = (1e3 * Spread.of(times).low for times in seconds)
    return MeasuredTimes(original, solved(shapes, [whole, shallow, narrow, thin]), machine)


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


def packed(model: PreTrainedModel) -> PreTrainedModel:
    """In 8 bit, as it will be served."""
    return quantize(model, linear_maps(model, 8), **ROWS)
