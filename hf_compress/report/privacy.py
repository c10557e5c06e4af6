"""Finds what must not be published: tokens, folders of a machine, names of people, addresses of a private network.

Nothing is taken out of a text: a wrong guess would damage it, and a half of what it should have found would stay. What
we write ourselves is made without it (`public_word`); what is found all the same is shown, and stops the publishing.
"""

import getpass
import html
import re
import shlex
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

from hf_compress.report.leak_patterns import (
    FOLDER,
    HOME,
    LONG,
    MAIL,
    PICTURE,
    PRIVATE,
    SECRET,
    SECRET_NAME,
    TOKEN,
    VALUE,
    holds_secret,
    is_random,
)

COMMON = {"root", "user", "users", "admin", "ubuntu", "runner", "jovyan", "app", "home", "localhost", "model", "test"}
MOST_LEAKS = 100  # of one text: it is not published for one of them
IN_ALL, IN_OURS = ("token", "home folder", "folder"), ("mail address", "private address", "user or machine name")


@dataclass(frozen=True)
class Leak:
    """What should stay private, and the line of the text where it stands, from 1."""

    kind: str
    text: str
    line: int


def find_leaks(text: str, *, kinds: Sequence[str] = (*IN_ALL, *IN_OURS), allow: Iterable[str] = ()) -> list[Leak]:
    """What of `kinds` stands in `text`, but for what is in `allow`, in whatever way it is written.

    Each line is read as it is, and as JSON, a link or a page would have it: `\\/home\\/me`, `%2Fhome%2Fme`.
    """
    allowed = {word.lower() for word in allow}
    patterns = {"token": TOKEN, "home folder": HOME, "folder": FOLDER, "mail address": MAIL, "private address": PRIVATE}
    if (names := _names() - allowed) and "user or machine name" in kinds:
        alternatives = "|".join(map(re.escape, sorted(names)))
        patterns["user or machine name"] = re.compile(rf"(?i)(?<![\w-])(?:{alternatives})(?![\w-])")
    found: dict[Leak, None] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = PICTURE.sub("", line)
        for reading in dict.fromkeys((line, _unescaped(line), unquote(line), html.unescape(line))):
            matches = [(kind, m.group()) for kind, pattern in patterns.items() for m in pattern.finditer(reading)]
            matches += [("token", secret) for secret in _secrets(reading)]
            for kind, what in matches:
                what = what.strip("\"'")
                is_allowed = any(what.lower() in one and one in reading.lower() for one in allowed)
                if kind in kinds and not is_allowed and not _is_known(found, what, number):
                    found[Leak(kind, what, number)] = None
                if len(found) == MOST_LEAKS:
                    return list(found)
    return list(found)


def _secrets(line: str) -> list[str]:
    """What follows a name that says so, and what looks like chance wherever it stands."""
    found = [m.group("value") for m in SECRET.finditer(line) if "*" not in m.group("value")]
    for match in VALUE.finditer(line):
        told = match.group("value")
        if told is None and holds_secret(match.group("token")):
            told = match.group("token")
        found += [told] if told and "*" not in told else []
    return found + [m.group() for m in LONG.finditer(line) if is_random(m.group())]


def _is_known(found: Iterable[Leak], what: str, line: int) -> bool:
    """The same, or more of it, was found before in this line."""
    return any(leak.line == line and what in leak.text for leak in found)


def _unescaped(line: str) -> str:
    line = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code.group(1), 16)), line)
    return line.replace("\\/", "/").replace("\\\\", "\\")


def _names() -> set[str]:
    """What the person and the machine are called."""
    names = {Path.home().name, socket.gethostname().partition(".")[0]}
    with suppress(OSError, KeyError, ImportError):  # a container's user without a name
        names.add(getpass.getuser())
    return {name.lower() for name in names if len(name) > 2} - COMMON


def public_word(word: str) -> str:
    """A word of a command, or the value of an option, fit for everyone: of a folder its last part, no token.

    A folder is what is spelled as one, and what is one here, such as `customers/acme.csv`. It may follow `name=`, and
    several may be joined by commas; blanks belong to them.
    """
    start, equals, value = word.partition("=")
    if equals and not re.search(r"[\\/]", start):
        return f"{start}={'***' if re.fullmatch(f'(?i)-*{SECRET_NAME}', start) else public_word(value)}"
    if "," in word:
        return ",".join(map(public_word, word.split(",")))
    if TOKEN.search(word) or (LONG.fullmatch(word) and is_random(word)):
        return "***"
    if re.match(r"(?:file:/+|~[\w.-]*)?/|~", word) and "://" not in word.removeprefix("file://"):
        return PurePosixPath(word).name or word
    is_folder = re.match(r"[A-Za-z]:[\\/]|\\\\|\.\.?[\\/]", word) or _is_here(word)
    return (PureWindowsPath(word).name if is_folder else "") or word


def _is_here(word: str) -> bool:
    """Whether `word` is a path with folders that are there, and not only something like `org/name`."""
    try:
        return len(PureWindowsPath(word).parts) > 1 and Path(word).exists()
    except (OSError, ValueError):  # too long, or no name at all
        return False


def public_command(words: Sequence[str]) -> str:
    """A command line from its words, each as `public_word` has it; what follows a `--token` is `***`."""
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_secret = re.fullmatch(f"(?i)-*{SECRET_NAME}", before) and not word.startswith("-")
        shown.append("***" if is_secret else public_word(word))
    return " ".join(word if word == "***" else shlex.quote(word) for word in shown)
