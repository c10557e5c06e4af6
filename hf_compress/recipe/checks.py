"""What is found out before a recipe runs: models that cannot read the texts, or do not know the labels."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from transformers import AutoConfig

from hf_compress.formats.export import RUNTIMES, installed
from hf_compress.recipe.data import RecipeData
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.stages import Stage, StudentOptions
from hf_compress.recipe.tasks.language import CausalLM


def need_labels(stages: Sequence[Stage]) -> bool:
    """Whether labels are trained on or measured; all else does without."""
    return any(stage.kind == "evaluate" or stage.part("fine-tune") for stage in stages)


def check_exports(stages: Sequence[Stage], model: str | Path, task: str) -> None:
    """Raise RecipeError for a runtime that is not installed, and for a model that GGUF has no name for."""
    for stage in (stage for stage in stages if stage.kind == "export"):
        format, family = stage.own.format, AutoConfig.from_pretrained(model).model_type
        if format in RUNTIMES:
            try:
                installed(format)
            except ImportError as error:
                raise RecipeError(f"{stage.name}: {error}") from error
        families = import_module("hf_compress.formats.runtimes.gguf_llama").FAMILIES if format == "gguf" else (family,)
        if family not in families or (format == "gguf" and task != CausalLM.name):
            raise RecipeError(f"{stage.name}: gguf holds language models of {families}, not a {family} for {task}.")


def check_data(data: RecipeData, model: str | Path, stages: Sequence[Stage], called: str) -> None:
    """Say what was read. Raise RecipeError where `model`, which stages know as `called`, or another does not fit it."""
    data.tell()
    known = [called, *(stage.name for stage in stages)]
    parts = [part for stage in stages for part in (stage.parts or (stage,))]
    for part in parts:
        if part.kind == "fine-tune" and not data.kind.is_trained_on_labels:
            raise RecipeError(
                f"{part.name}: there is nothing to fine-tune on for {data.task}. Distil with `method: {data.task}`, or "
                "say another --task."
            )
        if part.kind in ("fine-tune", "evaluate"):
            data.check_labelled("train" if part.kind == "fine-tune" else part.own.split)
    students = [option for part in parts for option in part.options if isinstance(option, StudentOptions)]
    named = [name for one in students for name in (one.teacher, one.student) if name is not None and name not in known]
    for source in (model, *named):
        data.tokenizer(source)
        data.check_length(source)
    first = next((stage for stage in stages if stage.kind != "publish"), None)
    if first and not first.part("fine-tune"):
        data.check_labels(AutoConfig.from_pretrained(model), f"The model that enters {first.name}")
