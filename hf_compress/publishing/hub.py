"""Publishes a model on the Hub: weights, tokenizer, card and report, in one commit or not at all.

The model's own files, from a list of known names, go up from where they lie, byte for byte. What is written beside them
is made here. All text is looked through before anything leaves the machine, and what should stay private stops it.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, Trainer

from hf_compress.files.inside import check_inside
from hf_compress.files.output import Output
from hf_compress.measuring.identity import model_identity, read_header
from hf_compress.model.record import QUANT_METHOD
from hf_compress.model.unfinished import check_finished, check_loaded
from hf_compress.publishing.remote_code import remote_code
from hf_compress.publishing.upload import Content, upload
from hf_compress.report.card import REPO_ID, Stage, model_card
from hf_compress.report.compare import compare
from hf_compress.report.privacy import IN_ALL, IN_OURS, find_leaks
from hf_compress.report.report import Report

PUBLISHED = (  # everything else in a folder stays where it is: optimizers, pickles, notes
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "*.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "quantize_config.json",
)  # fmt: skip
TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "chat_template")  # begin the names of files of words
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")  # words alone: any of them may look like one
PICTURES = (".png", ".model")
SHOWN = 5  # private texts in an error


@dataclass(frozen=True)
class Published:
    """What was sent, or with `dry_run` would have been. `files` is path -> bytes."""

    repo_id: str
    files: dict[str, int]
    url: str | None  # of the commit; None where nothing was sent


def push_to_hub(model: PreTrainedModel | Trainer, repo_id: str, *, tokenizer: Any = None, **options: Any) -> Published:
    """Publish a model, or the model and tokenizer of a trainer; `options` are those of `publish`."""
    if isinstance(model, Trainer):
        tokenizer = tokenizer or model.processing_class
        model = model.accelerator.unwrap_model(model.model)
    check_loaded(model, "push_to_hub")
    check_finished(model, "push_to_hub")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return publish(folder, repo_id, **options)


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError for what is no name of a repository."""
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be a name on the Hub, such as 'user/name', got {repo_id!r}.")


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    report: Report | str | Path | None = None,
    stages: Sequence[Stage] = (),
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    keep: str | Path | None = None,
    allow: Sequence[str] = (),
    **card_options: Any,
) -> Published:
    """Publish the model in `folder`, what `save_pretrained` and a tokenizer wrote, as `repo_id`.

    Args:
        report: what `compare` found of this very model and others, or a folder or file of it. Size and speed are
            measured now when it is not given.
        stages: how the model was made, for its card.
        private: of a repository that is made now; one that exists stays as it is.
        dry_run: build everything and send nothing.
        token: of the Hub; the one that `hf auth login` stored by default.
        endpoint: address of another Hub.
        revision: branch to write to.
        keep: a new or empty folder, or one of an earlier call, that gets a copy of everything that is sent.
        allow: texts that may be published though they look private, exactly as the error shows them.
        card_options: base_model, teacher, dataset_id, license, language, tags, limits, as in `hfc.model_card`.

    The model's own files are sent as they are; config.json of a compressed model gets an `auto_map` at its end. One
    commit holds everything: until it is made nobody sees any of it, and what was uploaded when a try failed is not
    uploaded again. Raises ValueError for a folder without a model, for names that are none, for a report of other
    models and for what should stay private, HubPermissionError (401, 403) and HubError for what the Hub refuses.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no model: config.json and *.safetensors of `save_pretrained` are needed.")
    files = own_files(folder)
    found, name = _report_of(report, folder, repo_id)
    files |= {f"report/{file}": content for file, content in found.files().items()}
    allow = (*allow, *repo_id.split("/"))
    card = model_card(found, model=name, repo_id=repo_id, stages=stages, allow=allow, labels=labels_of(folder),
                      **card_options)  # fmt: skip
    files["README.md"] = str(card).encode()
    check_private(files, allow=allow)
    if keep is not None:
        with Output(keep) as output:
            output.write(files)
    sizes = {file: len(c) if isinstance(c, bytes) else c.stat().st_size for file, c in sorted(files.items())}
    if dry_run:
        return Published(repo_id, sizes, None)
    where = {"token": token, "endpoint": endpoint, "revision": revision}
    return Published(repo_id, sizes, upload(files, repo_id, private=private, message=message, **where))


def labels_of(folder: Path) -> list[str]:
    """Names of a classifier's classes, by their numbers; none where they have no names but LABEL_0 and so on."""
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    return [] if all(name.startswith("LABEL_") for name in names.values()) else list(names.values())


def own_files(folder: Path) -> dict[str, Content]:
    """What of `folder` is published, by name: known files where they lie, and for a compressed model code to load it.

    Raises ValueError for a link that leads out of the folder.
    """
    files: dict[str, Content] = {}
    for pattern in PUBLISHED:
        for file in sorted(folder.glob(pattern)):
            check_inside(folder, file)
            files[file.name] = file
    config = AutoConfig.from_pretrained(folder)
    record = getattr(config, "quantization_config", None) or {}
    if record.get("quant_method") == QUANT_METHOD:
        with torch.device("meta"):
            del config.quantization_config
            model = getattr(transformers, config.architectures[0])(config)
        files |= remote_code(model, (folder / "config.json").read_text(encoding="utf-8"))
    return files


def _report_of(report: Report | str | Path | None, folder: Path, repo_id: str) -> tuple[Report, str]:
    """The report, and what it calls the model in `folder`. Raises ValueError for a report of others."""
    if report is None:
        name = repo_id.rpartition("/")[2]
        positions = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
        length = min(64, positions or 64)
        command = f"hf-compress publish {name}"
        found = compare({name: folder}, sequence_length=length, latency_rounds=10, throughput_rounds=3, command=command)
        return found, name
    if not isinstance(report, Report):
        file = Path(report)
        file = file / "report.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(f"There is no report at {report}: expected a folder with report.json of `compare`.")
        report = Report.from_json(file.read_text(encoding="utf-8"))
    identity = model_identity(folder)  # exports have none, nor has a model without safetensors
    named = {entry.measurement.identity: entry.name for entry in reversed(report.entries)}
    name = None if identity is None else named.get(identity)
    if name is None:
        raise ValueError(
            f"The report is of {', '.join(entry.name for entry in report.entries)}, none of which is the model in "
            f"{folder}: it was changed since. Compare it anew, or give no report; size and speed are measured then."
        )
    return report, name


def check_private(files: Mapping[str, Content], *, allow: Sequence[str] = ()) -> None:
    """Raise ValueError, with file and line, if anything in `files` looks private and is not in `allow`.

    Of the model's words (vocabularies, templates) only tokens of access and folders are asked.
    """
    found = []
    for name, content in sorted(files.items()):
        if name in VOCABULARIES or name.endswith(PICTURES):
            continue
        if name.endswith(".safetensors"):
            notes = {} if isinstance(content, bytes) else read_header(content)[0].get("__metadata__", {})
            text = "\n".join(f"{key}: {value}" for key, value in notes.items())
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
            text = data.decode(errors="replace")
        kinds = IN_ALL if name.startswith(TOKENIZER) else (*IN_ALL, *IN_OURS)
        found += [(name, leak) for leak in find_leaks(text, kinds=kinds, allow=allow)]
    if found:
        shown = "; ".join(f"{name}, line {leak.line}: {leak.text!r} ({leak.kind})" for name, leak in found[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"What should stay private would be published: {shown}{more}. Take it out, or allow each text by name."
        )
