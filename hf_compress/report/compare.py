"""A fair comparison: the same examples, in pairs, and the same machine, in turns.

Rates are those of the surveys: compression rate a / a* by parameters and by bytes on disk, speed-up s / s* by latency
and by throughput, the median over rounds; a and s are the reference's, a* and s* the compressed model's.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.measuring.isolated import How
from hf_compress.measuring.measure import Source, load_model, measure_sources
from hf_compress.measuring.metrics import Metric, accuracy
from hf_compress.measuring.quality import (
    as_metric,
    check_labels,
    example_scores,
    padding_collator,
    tokenizer_beside,
    unknown_tokens,
    usable_rows,
)
from hf_compress.measuring.significance import median_interval
from hf_compress.measuring.timing import Spread
from hf_compress.model.anatomy import anatomy
from hf_compress.report.differences import difference_of
from hf_compress.report.layers import embedding_facts, layer_facts
from hf_compress.report.privacy import public_command
from hf_compress.report.report import Report
from hf_compress.report.result import Entry, Interval

logger = logging.getLogger(__name__)

Named = tuple[str, Source | Sequence[Source]]


def compare(
    models: Mapping[str, Source | Sequence[Source]] | Sequence[str | Path | Named],
    *,
    eval_dataset: Sequence[Mapping] | Mapping[str, Sequence[Mapping]] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    data_collator: Callable | Mapping[str, Callable] | None = None,
    metric: Metric | Callable | Mapping[str, Metric] | None = None,
    metric_name: str | None = None,
    dataset_name: str | None = None,
    reference: str | None = None,
    batch_size: int = 32,
    sequence_length: int = 128,
    latency_rounds: int = 200,
    throughput_rounds: int = 30,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    command: str | None = None,
    isolate: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Compare quality, size and speed of several models.

    models            name -> model, folder or Hub name; a list of these under one name are seeds of one thing. Pairs
                      (name, model), or plain folders and Hub names, which name themselves, do as well. A folder that
                      `export` wrote for OpenVINO or ONNX Runtime is run there, measured in a process of its own
    eval_dataset      rows as `Trainer` takes them: tokenized, with a label column; None compares cost alone. Where
                      tokenizers differ, name -> rows: the same examples in the same order, as each model reads them
    processing_class  the tokenizer that pads; the reference's own, where that is a folder or Hub name
    data_collator     makes a batch of rows, or name -> such; pads with the tokenizer, under a mask, by default
    metric            metric(outputs, batch) -> (B,): a score for each example, higher is better; `batch` holds
                      "labels". Or a `Metric`, or name -> such, as `rouge(tokenizer)` for tokenizers that differ; by
                      default the usual one of the reference's task
    reference         name of the model that the others are held against; the first by default
    batch_size        of the evaluation; speed is always measured at 1 and 32
    dtype, device     for models that are loaded here, as in `measure`, as are the length and the rounds
    command           what made this report; by default the running one, without folders and tokens
    isolate           measure cost and speed in a process for each model, in turns, so that thread pools of one do not
                      touch another's; needs folders or Hub names
    clock             gives seconds, of measurements in this process

    Quality is of every seed, size and speed of the first. Raises ValueError for what cannot be compared.
    """
    entries = named_entries(models)
    reference = reference or next(iter(entries))
    if reference not in entries:
        raise ValueError(f"reference must be one of the models, {list(entries)}, got {reference!r}.")
    if isolate and any(isinstance(source, PreTrainedModel) for sources in entries.values() for source in sources[:1]):
        raise ValueError("isolate=True loads each model in a process of its own: give folders or Hub names.")
    firsts = {name: load_model(sources[0], dtype=dtype, device=device) for name, sources in entries.items()}
    scores: dict[str, Tensor] = {}  # name -> what the metric keeps, (seeds, examples, S)
    metrics: dict[str, Metric] = {}
    read: dict[str, tuple[int, int] | None] = {}  # name -> tokens that its tokenizer does not know, and all tokens
    if eval_dataset is not None:
        if metric in (None, accuracy):
            check_labels(firsts, reference, any_order=isinstance(eval_dataset, Mapping))
        own_rows = _rows_by_name(eval_dataset, entries)
        for name, sources in entries.items():
            own_metric = metric[name] if isinstance(metric, Mapping) else metric
            rows = usable_rows(own_rows[name], firsts[name], own_metric)
            metrics[name] = as_metric(own_metric, firsts[name], rows)
            pads_by = name if isinstance(eval_dataset, Mapping) else reference
            own_collator = data_collator[name] if isinstance(data_collator, Mapping) else data_collator
            collator = own_collator or padding_collator(
                rows, processing_class, entries[pads_by][0], firsts[name].main_input_name
            )
            others = (load_model(source, dtype=dtype, device=device) for source in sources[1:])
            logger.info("evaluating %s on %d examples", name, len(rows))
            read[name] = unknown_tokens(rows, processing_class or tokenizer_beside(entries[pads_by][0]))
            scores[name] = torch.stack(
                [
                    example_scores(model, rows, collator, metric=metrics[name], batch_size=batch_size)
                    for model in _one_by_one(firsts[name], others)
                ]
            )
    measurements = measure_sources(
        [sources[0] for sources in entries.values()], list(firsts.values()),
        How(sequence_length, dtype=dtype, device=device), latency_rounds=latency_rounds,
        throughput_rounds=throughput_rounds, isolate=isolate, clock=clock,
    )  # fmt: skip
    base = measurements[list(entries).index(reference)]
    total = metrics[reference].total if scores else None
    results = []
    for (name, model), cost in zip(firsts.items(), measurements, strict=True):
        results.append(
            Entry(
                name=name,
                architecture=type(model).__name__,
                needs_plugin=_quant_method(model) == "hf_compress",
                structure=structure(model),
                seed_qualities=tuple(total(scores[name]).tolist()) if scores else (),
                difference=None
                if not scores or name == reference
                else difference_of(scores[reference], scores[name], total),
                scores=metrics[name].further(scores[name]) if scores else {},
                measurement=cost,
                parameter_rate=base.parameters / cost.parameters,
                byte_rate=base.stored_bytes / cost.stored_bytes,
                latency_speed_up=median_ratio(base.latency_ms, cost.latency_ms),
                throughput_speed_up=median_ratio(cost.throughput, base.throughput),
                layers=layer_facts(model),
                unknown_tokens=read[name][0] if read.get(name) else None,
                num_tokens=read[name][1] if read.get(name) else None,
            )
        )
    return Report(
        reference=reference,
        entries=tuple(results),
        metric=metric_name or (metrics[reference].name if scores else "quality"),
        dataset=dataset_name,
        num_examples=0 if eval_dataset is None else len(own_rows[reference]),
        command=public_command(["python", *sys.argv]) if command is None else command,
    )


def named_entries(models: Mapping | Sequence) -> dict[str, list[Source]]:
    """name -> its seeds, checked."""
    pairs = list(models.items()) if isinstance(models, Mapping) else [_pair(item) for item in models]
    if not pairs:
        raise ValueError("there is nothing to compare: give at least one model.")
    entries: dict[str, list[Source]] = {}
    for name, source in pairs:
        if name in entries:
            raise ValueError(f"two models are called {name!r}. Name them yourself: [(name, model), ...].")
        entries[name] = list(source) if isinstance(source, (list, tuple)) else [source]
        if not entries[name]:
            raise ValueError(f"{name!r} holds no model: give at least one seed.")
    return entries


def _rows_by_name(eval_dataset: Sequence | Mapping, entries: Mapping[str, list[Source]]) -> dict[str, Sequence]:
    """name -> its rows. Raises ValueError unless every model has as many."""
    if not isinstance(eval_dataset, Mapping):
        return dict.fromkeys(entries, eval_dataset)
    if missing := sorted(set(entries) - set(eval_dataset)):
        raise ValueError(f"eval_dataset has rows for {sorted(eval_dataset)}, but none for {missing}.")
    lengths = {name: len(eval_dataset[name]) for name in entries}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"every model must answer the same examples, but their numbers differ: {lengths}. Texts of language models "
            "are cut into windows of tokens: another tokenizer, or a cut one, makes others."
        )
    return {name: eval_dataset[name] for name in entries}


def _pair(item: str | Path | Named) -> Named:
    if isinstance(item, (str, Path)):
        return Path(item).name, item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return item
    raise TypeError(f"expected a folder, a Hub name or a pair (name, model), got {type(item).__name__}.")


def _one_by_one(first: PreTrainedModel, others: Iterable[PreTrainedModel]) -> Iterable[PreTrainedModel]:
    """`others` are loaded as they come, so that the seeds of one name are not all in memory."""
    yield first
    yield from others


def median_ratio(above: Spread, below: Spread) -> Interval:
    """Median over rounds of the ratio of two samples taken in turns: what slowed a round slowed both.

    On a busy machine the ratio of the two medians scatters several times as much; on a quiet one they agree.
    """
    ratios = torch.tensor(above.samples, dtype=torch.double) / torch.tensor(below.samples, dtype=torch.double)
    return Interval(ratios.quantile(0.5).item(), *median_interval(ratios))


def structure(model: PreTrainedModel) -> dict[str, int | list[int]] | None:
    """Layers and their widths; None for a model that the anatomy does not know."""
    try:
        parts = anatomy(model)
    except ValueError as error:
        logger.info("no structure in the report: %s", error)
        return None
    return {
        "layers": len(parts.layers),
        "hidden_size": parts.hidden_size,
        "heads": [attention.num_heads for attention in parts.attentions],
        "neurons": [layer.feed_forward.num_neurons for layer in parts.layers],
        **embedding_facts(model),
    }


def _quant_method(model: PreTrainedModel) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    return config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
