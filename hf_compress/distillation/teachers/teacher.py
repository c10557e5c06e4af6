"""Loads a teacher and tells, before training, whether a student can learn from it."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from hf_compress.distillation.teachers.adapter_teacher import AdapterTeacher
from hf_compress.distillation.teachers.cache_files import is_cache
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.several_teachers import SeveralTeachers, teachers_of
from hf_compress.distillation.teachers.sharded_teacher import shard
from hf_compress.model.reading import open_tokenizer
from hf_compress.model.tasks import LANGUAGE_MODELS, auto_class_name, has_problem, plain_model
from hf_compress.model.unfinished import check_weights
from hf_compress.training.checks import weights_fact

HEADS = ["classifier", "score", "qa_outputs", "lm_head", "cls", "pooler", "pre_classifier"]  # stay in full precision
WITHOUT_LABELS = (*LANGUAGE_MODELS, "AutoModelForMultipleChoice")  # whatever their config says of a number of them
VOCABULARY_PADDING = 256  # a vocabulary grown to a multiple of at most this is padding, not other words
MOST_PADDING = 0.125  # of a vocabulary whose tokens are known to be fewer: more rows are words that were cut


def open_teacher(
    teacher: nn.Module | str | Path | Sequence, student: nn.Module, *, bits: int | None,
    weights: Sequence[float] | None, processing_class=None,
) -> nn.Module:  # fmt: skip
    """A model as it is; a cache by its folder; what else has a name or folder loaded for the task of `student`.

    A list of them becomes one teacher, by `weights`. One that `student` cannot learn from is refused by its config,
    before its weights are read.
    """
    if isinstance(teacher, list | tuple):
        options = {"bits": bits, "weights": None, "processing_class": processing_class}
        opened = [open_teacher(one, student, **options) for one in teacher]
        return SeveralTeachers(opened, weights)
    if weights is not None:
        raise ValueError(f"teacher_weights={list(weights)} are for a list of teachers, but teacher_model is one.")
    if isinstance(teacher, nn.Module):
        for one in teachers_of(teacher):
            if not isinstance(one, CachedTeacher):  # which has an architecture without weights
                check_weights(one, "A teacher's forward")
        return teacher
    return CachedTeacher(teacher) if is_cache(teacher) else load_teacher(teacher, student, bits, processing_class)


def load_teacher(
    name: str | Path, student: nn.Module, bits: int | None = None, processing_class=None
) -> PreTrainedModel:
    """Load a teacher by name or folder, with the Auto class of `student`; in 8 or 4 `bits` through bitsandbytes."""
    auto_class = auto_class_name(student)
    if auto_class is None:
        raise ValueError(
            f"A teacher cannot be loaded by name for a student of class {type(student).__name__}, whose task "
            "Transformers does not know. Load the teacher yourself and pass the model as teacher_model."
        )
    options = {}
    if bits is not None:
        width = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True}
        options["quantization_config"] = BitsAndBytesConfig(**width, llm_int8_skip_modules=HEADS)
    try:
        _check_configs(student, AutoConfig.from_pretrained(name), processing_class)
        return getattr(transformers, auto_class).from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(
            f"There is no teacher at {name!r}: expected a model folder or a name on the Hub ({error})."
        ) from error


def check_match(student: nn.Module, teacher: nn.Module, processing_class=None) -> None:
    """Raise ValueError when `student` cannot learn from `teacher`: other labels, vocabulary or lengths."""
    if isinstance(teacher, SeveralTeachers):
        for one in teacher.all:
            check_match(student, one, processing_class)
        return
    if isinstance(teacher, AdapterTeacher):
        teacher.check_student(student)
    elif teacher is student or _shares_parameters(student, teacher):
        raise ValueError(
            "Student and teacher are the same model, or share weights: the teacher would change while the student "
            "learns. Make a copy, for example with hfc.make_student or copy.deepcopy."
        )
    _check_configs(student, getattr(plain_model(teacher), "config", None), processing_class)


def _check_configs(student: nn.Module, theirs: PretrainedConfig | None, processing_class) -> None:
    mine = getattr(plain_model(student), "config", None)
    if not (isinstance(mine, PretrainedConfig) and isinstance(theirs, PretrainedConfig)):
        return  # a model of the user's own: nothing is known of it but its logits
    if auto_class_name(student) not in WITHOUT_LABELS:
        _check_labels(mine, theirs)
    _check_vocabulary(mine, theirs, processing_class)
    check_tokens(theirs, processing_class)
    _check_lengths(mine, theirs, processing_class)


def agree_on_problem(student: nn.Module, teacher: nn.Module) -> None:
    """Changes the student's config: its labels are of the kind (`problem_type`) that the teacher's config names.

    Raises ValueError where both name one, and not the same.
    """
    for one in teachers_of(teacher):
        mine, theirs = (getattr(plain_model(model), "config", None) for model in (student, one))
        wanted = getattr(theirs, "problem_type", None)
        if wanted is None or not isinstance(mine, PretrainedConfig) or not has_problem(student):
            continue
        own = mine.problem_type or wanted
        if own != wanted:
            raise ValueError(
                f"Student and teacher must predict labels of one kind: the student has problem_type={own!r}, the "
                f"teacher {wanted!r}. Load the student with problem_type={wanted!r}."
            )
        mine.problem_type = own


def check_heads(student: nn.Module, teacher: nn.Module, *, needs_logits: bool) -> None:
    """Raise ValueError for models whose outputs have no one set of logits that could be compared."""
    for who, model in (("student", student), *(("teacher", one) for one in teachers_of(teacher))):
        auto_class, name = auto_class_name(model), type(plain_model(model)).__name__
        if auto_class == "AutoModelForPreTraining":
            raise ValueError(
                f"The {who} is a {name}, which predicts for the tasks of its pre-training at once. Load it with the "
                "head of one task, such as AutoModelForMaskedLM."
            )
        if auto_class == "AutoModel" and needs_logits:
            raise ValueError(
                f"The {who} is a {name}, a model without a head: it has no logits. Load it with the head of a task, or "
                "learn from inner layers alone: hints with alpha=0, or a method with intermediate_share=1."
            )


def _shares_parameters(student: nn.Module, teacher: nn.Module) -> bool:
    own = {p.data_ptr() for p in student.parameters() if p.requires_grad and p.numel() and not p.is_meta}
    return any(p.data_ptr() in own for p in teacher.parameters() if p.numel() and not p.is_meta)


def _check_labels(mine: PretrainedConfig, theirs: PretrainedConfig) -> None:
    if mine.num_labels != theirs.num_labels:
        raise ValueError(
            f"Student and teacher must predict the same labels: the student has num_labels={mine.num_labels}, the "
            f"teacher num_labels={theirs.num_labels}. Load the student with num_labels={theirs.num_labels}."
        )
    named = [c for c in (mine, theirs) if c.id2label != {i: f"LABEL_{i}" for i in range(c.num_labels)}]
    if len(named) == 2 and mine.id2label != theirs.id2label:
        raise ValueError(
            f"Student and teacher must number their labels alike: the student has id2label={mine.id2label}, the "
            f"teacher {theirs.id2label}. Give student.config the teacher's id2label and label2id, and relabel the data."
        )


def _check_vocabulary(mine: PretrainedConfig, theirs: PretrainedConfig, tokenizer) -> None:
    sizes = [getattr(c.get_text_config(), "vocab_size", None) for c in (mine, theirs)]
    if None in sizes or sizes[0] == sizes[1]:
        return
    small, large = sorted(sizes)
    words = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    is_padding = large % 8 == 0 and large - small < VOCABULARY_PADDING
    if words is not None:
        is_padding = words <= small and large - small <= max(VOCABULARY_PADDING, MOST_PADDING * large)
    if not is_padding:
        known = "" if words is None else f"; the tokenizer has {words} tokens"
        raise ValueError(
            f"Student and teacher must read the same tokens: the student has vocab_size={sizes[0]}, the teacher "
            f"vocab_size={sizes[1]}{known}. Only padding of the same vocabulary is accepted. Use a student with the "
            "teacher's tokenizer, for example hfc.make_student(teacher, ...)."
        )


def check_tokens(theirs: PretrainedConfig, tokenizer) -> None:
    """Raise ValueError where the teacher's own tokenizer, if there is one on this machine, numbers tokens otherwise.

    Tokens that were added behind its own are no others; a teacher with fewer rows was cut since it was stored.
    """
    if not (hasattr(tokenizer, "get_vocab") and theirs.name_or_path):
        return
    try:
        own = open_tokenizer(theirs.name_or_path, local_files_only=True, trust_remote_code=False)
    except (ValueError, ImportError, KeyError):
        return  # a model alone, or one whose tokenizer cannot be read here
    known, mine = own.get_vocab(), tokenizer.get_vocab()
    if len(known) > (getattr(theirs.get_text_config(), "vocab_size", None) or 0):
        return
    if others := sum(known.get(token, max(number, len(known))) != number for token, number in mine.items()):
        raise ValueError(
            f"Student and teacher must read the same tokens: {others:,} of the {len(mine):,} in the student's "
            f"tokenizer have other numbers in {theirs.name_or_path}, or none. Where the vocabulary was cut, cut the "
            "teacher's, too: `prune_vocabulary` of both, or a teacher of its own that was cut before anything else."
        )


def _check_lengths(mine: PretrainedConfig, theirs: PretrainedConfig, tokenizer) -> None:
    student, teacher = (getattr(c.get_text_config(), "max_position_embeddings", None) for c in (mine, theirs))
    if student is None or teacher is None or teacher >= student:
        return
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is None or limit > teacher:
        raise ValueError(
            f"The teacher reads at most {teacher} positions, the student {student}: longer inputs would fail in the "
            f"teacher. Truncate the data: pass a tokenizer with model_max_length={teacher} or less as processing_class."
        )


def frozen(teacher: nn.Module, device: torch.device, *, is_sharded: bool = False) -> nn.Module:
    """`teacher` in eval mode on `device`, its parameters without gradients. Changes `teacher` and returns it.

    With `is_sharded` each process holds its part of a Transformers teacher in full precision.
    """
    for one in teachers_of(teacher):
        one.eval().requires_grad_(False)
        if getattr(one, "is_quantized", False) or hasattr(one, "hf_device_map"):
            continue  # already where it belongs
        if is_sharded and isinstance(one, PreTrainedModel):
            for buffer in shard(one).buffers():
                buffer.data = buffer.data.to(device)
        else:
            one.to(device)
    return teacher


def teacher_facts(teacher: nn.Module, *, learns: bool) -> dict[str, str]:
    """What tells a teacher, or each of several, from another, before ranks share out its weights: name -> value.

    One that `learns` with the student, or is part of it, is as DDP makes it.
    """
    found = {}
    for number, one in enumerate(teachers_of(teacher), 1):
        values = not learns and not isinstance(one, AdapterTeacher)
        fact = f"a cache of {one.whose}" if isinstance(one, CachedTeacher) else weights_fact(one, values=values)
        found["teacher_model" if number == 1 else f"teacher {number}"] = fact
    return found


def check_data(dataset, student: nn.Module) -> None:
    """Raise ValueError for a training set that is empty or has labels the student and its teacher do not know."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise ValueError("The training set is empty: expected at least one example. Was everything filtered out?")
    config = getattr(student, "config", None)
    column = next((c for c in ("labels", "label") if c in (getattr(dataset, "column_names", None) or ())), None)
    if column is None or auto_class_name(student) != "AutoModelForSequenceClassification" or config.num_labels == 1:
        return
    if "int" not in str(getattr(dataset.features[column], "dtype", "")):
        return  # several labels, or numbers
    labels = (x for x in dataset.unique(column) if x is not None)
    unknown = sorted(x for x in labels if not (x == -100 or 0 <= x < config.num_labels))
    if unknown:
        raise ValueError(
            f"The training set has labels {unknown} in `{column}`, but student and teacher know 0 to "
            f"{config.num_labels - 1}. Relabel the data, or use a teacher that was trained on these labels."
        )
