"""The kinds of stages, their methods, and which options each takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from hf_compress import distillation, pruning, quantization
from hf_compress.model.precision import has_fast_bfloat16
from hf_compress.recipe import one_shot, quantizing
from hf_compress.recipe.evaluate import Evaluate, EvaluateOptions
from hf_compress.recipe.options import RecipeError, build, check_seed, split_options, unknown
from hf_compress.recipe.publish import Export, ExportOptions, Publish, PublishOptions
from hf_compress.recipe.stage import INPUT, Method, Stage
from hf_compress.recipe.training import Change, Distil, FineTune, StudentOptions, Train
from hf_compress.training.arguments import CompressionArguments

ALIASES = {"distill": "distil", "finetune": "fine-tune"}
LONGEST_NAME = 64  # of a stage, in a folder's name
DEFAULT_METHODS = {"distil": "soft-targets", "prune": "structure", "quantize": "rtn"}


@dataclass
class StageOptions:
    name: str | None = field(default=None, metadata={"help": "What reports and other stages call this stage."})


Table = dict[str, Callable[[], Method]]


def _from_table(kind: str, table: Mapping[str, tuple[str, str, str]], stage: type[Stage], *more: type) -> Table:
    """Methods of a folder's `METHODS`, each imported when it is asked for."""

    def load(name: str, module: str, config: str, trainer: str) -> Method:
        home = import_module(module)
        return Method(kind, name, (StageOptions, *more, getattr(home, config)), stage, getattr(home, trainer))

    return {name: (lambda n=name, entry=entry: load(n, *entry)) for name, entry in table.items()}


def _plain(kind: str, table: Mapping[str, type], stage: type[Stage]) -> Table:
    return {n: (lambda n=n, o=options: Method(kind, n, (StageOptions, o), stage)) for n, options in table.items()}


def _fine_tune() -> Method:
    from hf_compress.training.state import TrainingStateMixin

    return Method("fine-tune", "fine-tune", (StageOptions, CompressionArguments), FineTune, TrainingStateMixin)


KINDS: dict[str, Table] = {
    "fine-tune": {"fine-tune": _fine_tune},
    "distil": _from_table("distil", distillation.METHODS, Distil, StudentOptions),
    "prune": {**_from_table("prune", pruning.METHODS, Train), **_plain("prune", one_shot.PRUNE, Change)},
    "quantize": {
        **_from_table("quantize", quantization.METHODS, Train),
        **_plain("quantize", quantizing.QUANTIZE, Change),
    },
    "evaluate": _plain("evaluate", {"evaluate": EvaluateOptions}, Evaluate),
    "export": _plain("export", {"export": ExportOptions}, Export),
    "publish": _plain("publish", {"publish": PublishOptions}, Publish),
}


def method_of(kind: str, name: str | None, where: str = "") -> Method:
    """The method called `name`, the usual one of its kind by default. Raises RecipeError naming the nearest one."""
    table = KINDS[kind]
    name = name or DEFAULT_METHODS.get(kind) or next(iter(table))
    if name not in table:
        raise unknown(name, table, f"{where or kind}: the method")
    return table[name]()


def read_stages(written: Any) -> list[Stage]:
    """The stages of a recipe, checked. Raises RecipeError, naming the stage, for what cannot be done."""
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        raise RecipeError("stages must be a list with at least one stage, such as `- quantize: {bits: 8}`.")
    stages = [_read_stage(entry, f"Stage {number}") for number, entry in enumerate(written, 1)]
    stages = _with_names(stages)
    _check_order(stages)
    return stages


def _read_stage(entry: Any, where: str, *, within: bool = False) -> Stage:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(
            f"{where} must be one kind with its options, such as `prune: {{sparsity: 0.5}}`, got {entry!r}."
        )
    ((kind, given),) = entry.items()
    kind = ALIASES.get(kind, kind)
    if kind == "together" and not within:
        return _read_together(given, where)
    if kind not in KINDS:
        raise unknown(str(kind), [*KINDS, "together"], f"{where}: the kind")
    given = {} if given is None else given
    where = f"{where} ({kind})"
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: options must be a mapping of names to values, got {given!r}.")
    given = dict(given)
    method = method_of(kind, given.pop("method", None), where)
    if method.name == "qat" and not within:
        raise RecipeError(f"{where}: qat rounds while another stage trains: put both under `together:`.")
    return make_stage(method, given, where)


def make_stage(method: Method, given: Mapping[str, Any], where: str) -> Stage:
    """A stage of `method` from its options as they were written."""
    parts = split_options(given, method.options, where)
    options = []
    for kind, values in zip(method.options, parts, strict=True):
        fixed = training_defaults(values) if issubclass(kind, TrainingArguments) else {}
        options.append(build(kind, values, where, **fixed))
        if issubclass(kind, TrainingArguments):
            try:
                check_training(options[-1], values)
            except ValueError as error:
                raise RecipeError(f"{where}: {error}") from error
    if getattr(options[1], "terms", None):
        check_terms(method, options, where)
    if getattr(options[1], "cache_teacher", False) and (method.name != "soft-targets" or options[-1].hints):
        raise RecipeError(
            f"{where}: cache_teacher keeps the teacher's logits alone, which is enough for soft-targets without hints. "
            f"Leave it out, or {'hints' if method.name == 'soft-targets' else method.name}."
        )
    if method.name == "scales" and (options[1].shape() or options[1].student):
        raise RecipeError(f"{where}: scales trains the packed model that enters: leave out student and its sizes.")
    name = name_of(method.kind, method.name, options[0].name)
    return method.stage(method.kind, name, method, tuple(options), {"method": method.name, **given})


def check_terms(method: Method, options: Sequence[Any], where: str) -> None:
    """Raise RecipeError for losses of inner layers that the method, or what else was given, leaves no room for."""
    student = options[1]
    if not method.trainer.takes_terms:
        raise RecipeError(f"{where}: {method.name} takes no terms. Give them to soft-targets, or leave them out.")
    if student.cache_teacher:
        raise RecipeError(f"{where}: cache_teacher keeps the teacher's logits alone, and terms read inner layers.")
    if method.name in student.named_terms:
        raise RecipeError(f"{where}: {method.name} is learned already: leave it out of the terms.")


def name_of(kind: str, method: str | None, given: str | None) -> str:
    """What reports, other stages and `--set` call a stage: its own name, or what it does."""
    return given or ((method or DEFAULT_METHODS[kind]) if kind in ("prune", "quantize") else kind)


def training_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe sets where a Trainer has no good default for one that may be cut off and goes on."""
    defaults = dict(
        output_dir="trainer_output", report_to="none", save_steps=0.1, save_total_limit=2, logging_steps=50,
        save_strategy="steps", bf16=has_fast_bfloat16() and not given.get("fp16"),
        use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    return {name: value for name, value in defaults.items() if name not in given}


LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
         "learning_rate": 0, "weight_decay": 0}  # fmt: skip


def check_training(options: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers that a training fails on when it has begun, or passes over."""
    for name in ("seed", "data_seed"):
        if getattr(options, name) is not None:
            check_seed(name, getattr(options, name))
    for name, least in LEAST.items():
        if not least <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be at least {least}, and a number, got {getattr(options, name)}.")
    if "max_steps" in given and options.max_steps < 1 and options.max_steps != -1:
        raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {options.max_steps}.")
    if not 0 < options.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs must be above 0, and a number, got {options.num_train_epochs}.")
    available = {"all", "none", *get_available_reporting_integrations()}
    if missing := sorted(name for name in options.report_to or () if isinstance(name, str) and name not in available):
        raise ValueError(f"report_to: {missing[0]} is not installed here, or none that Transformers knows.")


TOGETHER = ("fine-tune", "distil", "prune", "quantize")


def _read_together(given: Any, where: str) -> Stage:
    where = f"{where} (together)"
    name = None
    if isinstance(given, Mapping) and "stages" in given:
        if extra := set(given) - {"stages", "name"}:
            raise unknown(sorted(extra)[0], ["stages", "name"], f"{where}: the option")
        given, name = given["stages"], given.get("name")
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        raise RecipeError(f"{where} takes a list of two or more stages that train in one run.")
    parts = [_read_stage(entry, f"{where}, part {i}", within=True) for i, entry in enumerate(given, 1)]
    kinds = [part.kind for part in parts]
    if len(set(part.name for part in parts)) < len(parts) or any(kind not in TOGETHER for kind in kinds):
        raise RecipeError(
            f"{where} takes fine-tune or distil, prune and quantize stages, each method once; got {kinds}."
        )
    if any(trains_packed(part) for part in parts):
        raise RecipeError(f"{where}: scales train after the weights are packed; make it a stage behind `quantize`.")
    if len([kind for kind in kinds if kind in ("fine-tune", "distil")]) != 1:
        raise RecipeError(f"{where} needs one fine-tune or distil stage, whose training the others join; got {kinds}.")
    arguments = {f.name for f in fields(CompressionArguments)}
    for part in parts:
        if part.kind == "prune" and not hasattr(part.own, "callback"):
            raise RecipeError(f"{where}: {part.name} does not prune while training; make it a stage of its own.")
        if part.kind == "quantize" and part.method.name != "qat":
            raise RecipeError(f"{where}: quantize with `method: qat`, the one that trains; got {part.method.name}.")
        if part.kind == "prune" and (foreign := arguments.intersection(part.given)):
            raise RecipeError(f"{where}: {sorted(foreign)} belong to the stage that trains, not to {part.name}.")
    (main,) = (part for part in parts if isinstance(part, (FineTune, Distil)))
    written = {"stages": [{"kind": part.kind, **part.given} for part in parts]}
    return replace(main, kind="together", name=name or "together", given=written, together=tuple(parts))


def numbered(names: Sequence[str]) -> list[str]:
    """Names that occur once: a second `evaluate` is called evaluate-2."""
    return [name if (n := list(names[: i + 1]).count(name)) == 1 else f"{name}-{n}" for i, name in enumerate(names)]


def _with_names(stages: list[Stage]) -> list[Stage]:
    named = [replace(s, name=name) for s, name in zip(stages, numbered([s.name for s in stages]), strict=True)]
    for stage in named:
        if not stage.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise RecipeError(f"A stage's name becomes a folder: letters, digits, - and _ only, got {stage.name!r}.")
        if len(stage.name) > LONGEST_NAME or stage.name == INPUT:
            why = f"{INPUT!r} is the model that a recipe begins with" if stage.name == INPUT else (
                f"at most {LONGEST_NAME} characters")  # fmt: skip
            raise RecipeError(f"A stage cannot be called {stage.name!r:.80}: {why}.")
    return named


def trains_packed(stage: Stage) -> bool:
    """Whether a stage trains a packed model, which stays packed."""
    return stage.method is not None and stage.method.name == "scales"


def _check_vocabularies(stages: Sequence[Stage]) -> None:
    """A teacher from before its student's vocabulary was cut would read other words under the same numbers."""
    cuts, last, reference = {INPUT: 0}, INPUT, INPUT  # name of a model -> how often its vocabulary was cut
    for number, stage in enumerate(stages, 1):
        before = last
        for roles in (part.roles for part in stage.parts if isinstance(part, Distil)):
            before = roles.student or last
            teacher = roles.teacher or (last if roles.shape() or roles.student else reference)
            if {before, teacher} <= cuts.keys() and cuts[before] != cuts[teacher]:
                cut = next(s.name for s in stages if cuts.get(s.name) == max(cuts[before], cuts[teacher]))
                raise RecipeError(
                    f"Stage {number} ({stage.name}) learns from {teacher}, which reads other tokens than its student: "
                    f"{cut} cut the vocabulary between them. Let both come after it: say `teacher: {cut}`."
                )
        if stage.makes_model:
            is_cut = any(part.method.name == "vocabulary" for part in stage.parts)
            cuts[stage.name] = cuts.get(before, cuts[last]) + is_cut
            last, reference = stage.name, stage.name if stage.tunes else reference


def _check_order(stages: Sequence[Stage]) -> None:
    packed, made = None, [INPUT]
    names = {stage.name for stage in stages}
    for number, stage in enumerate(stages, 1):
        for name in (name for part in stage.parts for name in part.named()):
            if name in names - set(made):
                raise RecipeError(
                    f"Stage {number} ({stage.name}) takes the model of {name}, which no stage before it makes: there "
                    f"are {', '.join(made)}."
                )
        for name in (name for part in stage.parts for name in part.of_stages()):
            if name not in made:
                raise unknown(name, made, f"Stage {number} ({stage.name}): among the models before it,")
        made += [stage.name] * stage.makes_model
        if packed and stage.makes_model and not trains_packed(stage):
            raise RecipeError(
                f"Stage {number} ({stage.name}) changes or trains weights, but stage {packed} packs them in few bits. "
                "Quantize last, or put both under `together:` with `method: qat`; afterwards only scales train, by "
                "`distil: {method: scales}`."
            )
        if stage.packs:
            packed = number
    _check_vocabularies(stages)
