"""Sends files to the Hub in one commit, trying again what may pass, and says in a sentence what its answers mean."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http

logger = logging.getLogger(__name__)

Content = Path | bytes
ATTEMPTS = 5
WAIT_SECONDS = 2.0  # before the second attempt; twice as long before each one after it
PATIENCE_SECONDS = 120.0  # for a first answer, or for more of one
# the error of all HTTP trouble, of whichever HTTP library the installed huggingface_hub is built on
HTTPError = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
FAILURES = (HfHubHTTPError, HTTPError, ConnectionError, RuntimeError)
WORTH_ANOTHER_TRY = (408, 409, 412, 425, 429, 500, 502, 503, 504)


class HubError(RuntimeError):
    """The Hub did not take what was sent."""


class HubPermissionError(HubError, PermissionError):
    """The Hub knows nobody by this token, or does not let them write there."""


def upload(
    files: Path | Mapping[str, Content],
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
    """Send `files`, name -> file or bytes, or all of a folder, in one commit. Returns the commit's URL.

    What may pass is tried again. `replaces` is a folder of the repository: the same commit takes out what is there and
    is not sent again. With `private=None` the account's own habit decides. Raises ValueError for an address that is
    none, HubPermissionError (401, 403) and HubError for what the Hub refuses.
    """
    api = HfApi(token=token, endpoint=endpoint)
    if not api.endpoint.startswith(("http://", "https://")):
        raise ValueError(f"The Hub's address must begin with https://, got {api.endpoint!r}. Is HF_ENDPOINT right?")
    if isinstance(files, Path):
        files = {f.relative_to(files).as_posix(): f for f in sorted(files.rglob("*")) if f.is_file()}
    with _hub_errors(repo_id), _patience():
        for attempt in range(ATTEMPTS):
            try:
                api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
                # upload_folder would make several commits
                operations = [CommitOperationAdd(name, content) for name, content in files.items()]
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
    if isinstance(status, str) and "Timeout" in status:  # it has been waited for long enough
        return False
    return status in WORTH_ANOTHER_TRY if isinstance(status, int) else type(error) is not RuntimeError


@contextmanager
def _patience() -> Iterator[None]:
    """A Hub that says nothing is waited for no longer than PATIENCE_SECONDS; huggingface_hub would wait for ever."""
    usual = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)

    def patient():
        client = usual()
        client.timeout = PATIENCE_SECONDS
        return client

    set_client_factory(patient)
    try:
        yield
    finally:
        set_client_factory(usual)


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
