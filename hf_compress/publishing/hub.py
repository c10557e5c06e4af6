"""Publishes a model on the Hub: weights, tokenizer, card and report, in one commit or not at all.

What is sent is built in a folder first, file by file from a list of known names, cleaned of tokens and local paths, and
looked through once more before anything leaves the machine.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, PreTrainedModel, Trainer

from hf_compress.model.record import QUANT_METHOD
from hf_compress.publishing.remote_code import add_remote_code
from hf_compress.report.card import REPO_ID, Stage, model_card
from hf_compress.report.compare import compare
from hf_compress.report.privacy import secrets_in, without_secrets
from hf_compress.report.report import Report

logger = logging.getLogger(__name__)

PUBLISHED = (  # everything else in a folder stays where it is: optimizers, pickles, notes
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "*.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "quantize_config.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")  # their tokens may look like paths
ATTEMPTS = 5
WAIT_SECONDS = 2.0  # before the second attempt; twice as long before each one after it
# the error of all HTTP trouble, of whichever HTTP library the installed huggingface_hub is built on
HTTPError = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
FAILURES = (HfHubHTTPError, HTTPError, ConnectionError, RuntimeError)
WORTH_ANOTHER_TRY = (408, 409, 412, 425, 429, 500, 502, 503, 504)


class HubError(RuntimeError):
    """The Hub did not take what was sent."""


class HubPermissionError(HubError, PermissionError):
    """The Hub knows nobody by this token, or does not let them write there."""


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
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return publish(folder, repo_id, **options)


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
    **card_options: Any,
) -> Published:
    """Publish the model in `folder`, what `save_pretrained` and a tokenizer wrote, as `repo_id`.

    Args:
        report: what `compare` found, or a folder or file of it; its last model is taken to be this one. Size and speed
            are measured now when it is not given.
        stages: how the model was made, for its card.
        private: of a repository that is made now; one that exists stays as it is.
        dry_run: build everything and send nothing.
        token: of the Hub; the one that `hf auth login` stored by default.
        endpoint: address of another Hub.
        revision: branch to write to.
        keep: a folder that gets a copy of everything that is sent.
        card_options: base_model, teacher, dataset_id, license, language, tags, limits, as in `hfc.model_card`.

    One commit holds everything: until it is made nobody sees any of it, and what was uploaded when a try failed is not
    uploaded again. Raises ValueError for a folder without a model and for names that are none, HubPermissionError
    (401, 403) and HubError for what the Hub refuses.
    """
    folder = Path(folder)
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be a name on the Hub, such as 'user/name', got {repo_id!r}.")
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no model: config.json and *.safetensors of `save_pretrained` are needed.")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "model"
        stage_folder(folder, staged)
        found = _report_of(report, staged, repo_id)
        _write_report(found, staged)
        card = model_card(found, model=found.entries[-1].name, repo_id=repo_id, stages=stages, **card_options)
        card.save(staged / "README.md")
        check_private(staged)
        files = {str(p.relative_to(staged)): p.stat().st_size for p in sorted(staged.rglob("*")) if p.is_file()}
        if keep is not None:
            shutil.copytree(staged, keep, dirs_exist_ok=True)
        if dry_run:
            return Published(repo_id, files, None)
        where = {"token": token, "endpoint": endpoint, "revision": revision}
        return Published(repo_id, files, upload(staged, repo_id, private=private, message=message, **where))


def stage_folder(folder: Path, staged: Path) -> Path:
    """Copy what is to be published of `folder` to `staged`: known files, cleaned, with code for remote loading."""
    staged.mkdir(parents=True)
    for pattern in PUBLISHED:
        for file in sorted(folder.glob(pattern)):
            if file.suffix == ".json" and file.name not in VOCABULARIES:
                plain = _cleaned(json.loads(file.read_text(encoding="utf-8")))
                (staged / file.name).write_text(
                    json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
            else:
                shutil.copyfile(file, staged / file.name)
    config = AutoConfig.from_pretrained(staged)
    record = getattr(config, "quantization_config", None) or {}
    if record.get("quant_method") == QUANT_METHOD:
        with torch.device("meta"):
            del config.quantization_config
            model = getattr(transformers, config.architectures[0])(config)
        add_remote_code(model, staged)
    return staged


def _cleaned(value: Any) -> Any:
    """A JSON value without tokens, local paths, and the name of the folder that a model was loaded from."""
    if isinstance(value, Mapping):
        return {key: _cleaned(part) for key, part in value.items() if key not in ("_name_or_path", "name_or_path")}
    if isinstance(value, list):
        return [_cleaned(part) for part in value]
    return without_secrets(value) if isinstance(value, str) and secrets_in(value) else value


def _report_of(report: Report | str | Path | None, staged: Path, repo_id: str) -> Report:
    if isinstance(report, Report):
        found = report
    elif report is None:
        name = repo_id.rpartition("/")[2]
        positions = getattr(AutoConfig.from_pretrained(staged).get_text_config(), "max_position_embeddings", None)
        length = min(64, positions or 64)
        command = f"hf-compress publish {name}"
        found = compare({name: staged}, sequence_length=length, latency_rounds=10, throughput_rounds=3, command=command)
    else:
        file = Path(report)
        file = file / "report.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(f"There is no report at {report}: expected a folder with report.json of `compare`.")
        found = Report.from_json(file.read_text(encoding="utf-8"))
    dataset = found.dataset and without_secrets(found.dataset)
    return replace(found, command=without_secrets(found.command), dataset=dataset)


def _write_report(report: Report, staged: Path) -> None:
    report.save(staged / "report")


def check_private(staged: Path) -> None:
    """Raise ValueError, naming the file, if anything in `staged` looks like a token or a local path."""
    for file in sorted(p for p in staged.rglob("*") if p.is_file()):
        if file.suffix in (".safetensors", ".model", ".png", ".html") or file.name in VOCABULARIES:
            continue  # weights, pictures, words, and a page made of the report that is checked beside it
        if found := secrets_in(file.read_text(encoding="utf-8")):
            raise ValueError(
                f"{file.name} holds what should stay private: {found[0]!r}. Take it out and publish again."
            )


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = True,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    repo_type: str = "model",
    replaces: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Send everything in `folder` in one commit, trying again what may pass. Returns the commit's URL.

    `replaces` is a folder of the repository: the same commit takes out what is there and is not sent again. With
    `private=None` the account's own habit decides. Raises ValueError for an address that is none.
    """
    api = HfApi(token=token, endpoint=endpoint)
    if not api.endpoint.startswith(("http://", "https://")):
        raise ValueError(f"The Hub's address must begin with https://, got {api.endpoint!r}. Is HF_ENDPOINT right?")
    files = sorted(file for file in folder.rglob("*") if file.is_file())  # upload_folder would make several commits
    with _hub_errors(repo_id):
        for attempt in range(ATTEMPTS):
            try:
                api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
                operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
                if replaces is not None:
                    sent = {operation.path_in_repo for operation in operations}
                    there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
                    gone = [name for name in there if name.startswith(f"{replaces}/") and name not in sent]
                    operations += [CommitOperationDelete(name) for name in gone]
                where = {"repo_type": repo_type, "revision": revision}
                return api.create_commit(repo_id, operations, commit_message=message, **where).commit_url
            except FAILURES as error:
                if attempt + 1 == ATTEMPTS or not _may_pass(error):
                    raise
                wait = WAIT_SECONDS * 2**attempt
                logger.warning("The upload broke off (%s); trying again in %.0f s.", _status(error), wait)
                sleep(wait)
    raise AssertionError("the loop above returns or raises")


def _status(error: Exception) -> Any:
    """The HTTP status at the root of an error, or the kind of error where there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        if error.__cause__ is None:
            return type(error).__name__
        error = error.__cause__
    return None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    return status in WORTH_ANOTHER_TRY if isinstance(status, int) else type(error) is not RuntimeError


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Says in a sentence what the Hub's answer means."""
    try:
        yield
    except FAILURES as error:
        status = _status(error)
        sentences = {
            401: "the Hub does not know this token. Run `hf auth login`, or set HF_TOKEN",
            403: f"this token may not write to {repo_id}. Use one with write access, or another name",
            404: f"the Hub has no {repo_id} for you. Check the name before the slash",
            409: f"{repo_id} was changed by someone else at the same time. Run the same command again",
            413: "the Hub finds a file too large. Save with a smaller max_shard_size",
        }
        happened = f"it answered {status}" if isinstance(status, int) else f"the connection broke off ({status})"
        what = sentences.get(status, f"{happened}. Nothing of this commit can be seen; run the same again")
        kind = HubPermissionError if status in (401, 403) else HubError
        raise kind(f"Publishing {repo_id} failed: {what}.") from error


__all__ = ["HubError", "HubPermissionError", "Published", "publish", "push_to_hub", "upload"]
