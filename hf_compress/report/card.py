"""A model card that says only what was measured or given."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_compress.measuring.measurement import PYTORCH
from hf_compress.report import tables
from hf_compress.report.headline import headline
from hf_compress.report.privacy import find_leaks
from hf_compress.report.report import Report
from hf_compress.report.result import Entry

TEMPLATE = Path(__file__).with_name("card.md.j2")
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
PIPELINES = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "CausalLM": "text-generation",
}
QUANTIZED_BELOW_BITS = 16  # mean bits a weight


@dataclass(frozen=True)
class Stage:
    """One step that made the model: what it is called, its options, and where it is from."""

    name: str
    options: dict[str, object]
    paper: str | None = None


def model_card(
    report: Report,
    *,
    model: str,
    repo_id: str,
    base_model: str | None = None,
    teacher: str | None = None,
    dataset_id: str | None = None,
    dataset_split: str | None = None,
    stages: Sequence[Stage] = (),
    tags: Sequence[str] = (),
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    limits: Sequence[str] = (),
    labels: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> ModelCard:
    """The card of one model of `report`, for `repo_id` on the Hub. Asks nothing of the network.

    model          name of the model in the report
    base_model     Hub name of what it was made from; no folder
    teacher        Hub name, or a name in the report, of what it learned from
    dataset_id     Hub name of the evaluation data, or an identifier such as "bbc-news"; results are listed with it
    stages         the steps that made it, in order
    limits         sentences on what it should not be used for
    labels         names of its classes, in the order of their numbers
    allow          texts that the card may hold though they look private: a folder, a mail address

    Raises ValueError for names that are local folders, for exported models and for what should stay private, with its
    line, and KeyError for a model that is not in the report.
    """
    entry = report[model]
    if entry.measurement.runtime != PYTORCH:
        raise ValueError(f"{model} is an export for {entry.measurement.runtime}, whose README says how it is run: a "
                         "card is of a model that Transformers loads.")  # fmt: skip
    names = {"repo_id": repo_id, "base_model": base_model, "dataset_id": dataset_id}
    if teacher not in [other.name for other in report.entries]:
        names["teacher"] = teacher
    for label, name in names.items():
        if name is not None and (not REPO_ID.fullmatch(name) or Path(name).exists()):
            raise ValueError(f"{label} must be a name on the Hub, such as 'user/name', got {name!r}.")
    task = entry.architecture.partition("For")[2]
    quantized = entry.measurement.bits_per_weight < QUANTIZED_BELOW_BITS
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model,
        pipeline_tag=PIPELINES.get(task),
        language=language if language is None or isinstance(language, str) else list(language),
        license=license,
        datasets=[dataset_id] if dataset_id else None,
        metrics=[report.metric] if entry.quality is not None else None,
        tags=["hf_compress", *dict.fromkeys(tags)],
        model_name=repo_id.rpartition("/")[2],
        eval_results=_eval_results(report, entry, task, dataset_id, dataset_split),
        **({"base_model_relation": "quantized" if quantized else "finetune"} if base_model else {}),
    )
    text = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        report=report,
        entry=entry,
        repo_id=repo_id,
        teacher=teacher,
        stages=stages,
        limits=limits,
        labels=labels,
        told=headline(report, entry) if entry.name != report.reference else None,
        auto_class=auto_class(entry.architecture),
        quality=tables.quality_text(report, entry),
        structure=structure_sentences(entry),
        table=tables.markdown(report),
        count=tables.count_text,
        size=tables.size_text,
    ).content
    if leaks := find_leaks(text, allow=(*allow, *repo_id.split("/"))):
        shown = "; ".join(f"line {leak.line}: {leak.text!r} ({leak.kind})" for leak in leaks)
        raise ValueError(f"The card would tell what should stay private: {shown}. Take it out, or allow it by name.")
    return ModelCard(text)


def _eval_results(
    report: Report, entry: Entry, task: str, dataset_id: str | None, dataset_split: str | None
) -> list[EvalResult] | None:
    if entry.quality is None or dataset_id is None:
        return None
    return [
        EvalResult(
            task_type=PIPELINES.get(task, "other"),
            dataset_type=dataset_id,
            dataset_name=report.dataset or dataset_id,
            dataset_split=dataset_split,
            metric_type=report.metric,
            metric_value=round(entry.quality, 4),
        )
    ]


def auto_class(architecture: str) -> str:
    """The Auto class that loads `architecture`, or the class itself where no Auto class is of that name."""
    task = architecture.partition("For")[2]
    name = f"AutoModelFor{task}" if task else "AutoModel" if architecture.endswith("Model") else architecture
    return name if hasattr(transformers, name) and not architecture.endswith("HeadModel") else architecture


def structure_sentences(entry: Entry) -> list[str]:
    """Layers, heads and neurons in words; a list where they differ from layer to layer."""
    if entry.structure is None:
        return []
    parts = [f"{entry.structure['layers']} layers of hidden size {entry.structure['hidden_size']}"]
    for kind in ("heads", "neurons"):
        widths = entry.structure[kind]
        parts.append(f"{widths[0]} {kind} a layer" if len(set(widths)) == 1 else f"{kind} by layer: {widths}")
    return parts
