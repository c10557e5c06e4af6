"""Takes out of a text what must not be published: access tokens and folders of the machine."""

import re
from pathlib import PurePosixPath, PureWindowsPath

TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
TOKEN_OPTION = re.compile(r"(--?[\w-]*token)([= ]+)('[^']*'|\"[^\"]*\"|[^\s-]\S*)")
# a path from a root: /home/me/x, ~/x, ~me/x, file:///x; neither the inside of a URL nor a/b or 3/4
ROOT = r"(?<![\w.:/~-])(?:file://|~[\w.-]*)?/"
POSIX_PATHS = (re.compile(rf"(?<=['\"]){ROOT}[^'\"\n]+(?=['\"])"), re.compile(rf"{ROOT}[^\s'\"`,;:()\[\]]+"))
WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:[\\/](?!/)[^\s'\"`,;()]+")


def without_secrets(text: str) -> str:
    """`text` with tokens replaced by `***` and absolute paths by their last part."""
    text = TOKEN.sub("***", TOKEN_OPTION.sub(r"\1\2***", text))
    text = WINDOWS_PATH.sub(lambda match: PureWindowsPath(match.group()).name, text)
    for path in POSIX_PATHS:
        text = path.sub(lambda match: PurePosixPath(match.group()).name, text)
    return text


def secrets_in(text: str) -> list[str]:
    """What `without_secrets` would take out of `text`, in order."""
    found = [match.group() for match in TOKEN.finditer(text)]
    found += [match.group(3) for match in TOKEN_OPTION.finditer(text) if match.group(3) != "***"]
    found += [match.group() for pattern in (WINDOWS_PATH, *POSIX_PATHS) for match in pattern.finditer(text)]
    return list(dict.fromkeys(found))
