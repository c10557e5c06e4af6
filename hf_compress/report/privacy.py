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

NAME = r"[^\s\\/\"'`<>|:;,*?()\[\]{}]+"  # a part of a path
TOKEN = re.compile(
    r"\b(?:hf|api_org|gh[pousr]|github_pat|glpat|npm|pypi|sk|pk|rk|xox[abeprs]|xapp|dop_v1|shp(?:at|ss|ca)|ya29|SG|r8|nvapi|"
    r"gsk|tvly|lsv2|pcsk|figd|sntrys|dckr_pat|oauth|whsec|AC|key)[-_.][\w.-]{16,}"  # prefix, then chance
    r"|\bA(?:KIA|SIA|IDA|ROA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\b[Bb]earer +[\w.~+/-]{8,}|://[^\s/:@\"']+:[^\s/@\"']+@"
)
# an option or key that says of itself what it holds; `pad_token` and the like are none
SECRET_NAME = (
    r"(?:--?[\w-]*token|\b(?:[\w-]*[_-])?(?:pass(?:word|wd|phrase)?|secret|api[_-]?key|access[_-]?key|private[_-]?key|"
    r"(?:hf|hub|auth|access|api|bearer|refresh|session)[_-]?token|credentials?))"
)
SECRET = re.compile(
    rf"(?i){SECRET_NAME}[\"']?(?:\s*[=:]\s*|\s+(?=[\"']?[^\s-]))"
    r"(?P<value>\"[^\"]+\"|'[^']+'|[^\s,;\"'}]{6,})"
)
LONG = re.compile(r"(?<![\w+/=-])[A-Za-z0-9]{20,}(?![\w+/=-])")  # of which `_is_random` says more
PICTURE = re.compile(r"base64,[A-Za-z0-9+/=]+")
MAIL = re.compile(r"(?<![\w.@/:])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
HOME = re.compile(
    r"(?i)(?<![\w.-])(?:file:/+)?(?:/(?:mnt/|cygdrive/)?[a-z](?=/))?(?:[a-z]:)?[\\/]+"
    rf"(?:home|users|documents and settings)[\\/]+{NAME}[^\s\"'<>]*"
    rf"|(?<![\w.])/root/{NAME}|(?<![\w./~])~[\w.-]*[\\/]+{NAME}"
)
FOLDER = re.compile(
    rf"(?<![\w.:/<~\\-])(?:file:/+)?/+{NAME}(?:/+{NAME})+/?|(?<!\w)[A-Za-z]:[\\/]+(?!/){NAME}[^\s\"'<>]*"
    rf"|(?<![\w\\])\\\\[\w.$-]{{2,}}\\[\w$.-]+[^\s\"'<>]*"
)
PRIVATE = re.compile(
    r"(?i)(?<![\w.-])(?:localhost|127(?:\.\d+){3}|10(?:\.\d{1,3}){3}|192\.168(?:\.\d+){2}|172\.(?:1[6-9]|2\d|3[01])(?:\.\d+){2})"
    r"(?![\w.])(?::\d+)?|\bhttps?://[\w-]+(?=[:/\s\"'<]|$)[^\s\"'<]*"
    r"|\b(?:https?://)?(?:[\w-]+\.)+(?:local|internal|intranet|corp|lan)\b[^\s\"'<]*"
    r"|\b(?:s3a?|gs|gcs|abfss?|wasbs?|hdfs|dbfs|smb|nfs|ssh|sftp|ftp|oss|r2)://[^\s\"'<]+"
)
COMMON = {"root", "user", "users", "admin", "ubuntu", "runner", "jovyan", "app", "home", "localhost", "model", "test"}
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
            matches += [("token", m.group("value")) for m in SECRET.finditer(reading) if "*" not in m.group("value")]
            matches += [("token", m.group()) for m in LONG.finditer(reading) if _is_random(m.group())]
            for kind, what in matches:
                what = what.strip("\"'")
                is_allowed = any(what.lower() in one and one in reading.lower() for one in allowed)
                if kind in kinds and not is_allowed and not _is_known(found, what, number):
                    found[Leak(kind, what, number)] = None
    return list(found)


def _is_known(found: Iterable[Leak], what: str, line: int) -> bool:
    """The same, or more of it, was found before in this line."""
    return any(leak.line == line and what in leak.text for leak in found)


def _unescaped(line: str) -> str:
    return line.replace("\\/", "/").replace("\\\\", "\\")


def _is_random(word: str) -> bool:
    """Letters of both cases and digits in no order that a name has, as in tokens of any make."""
    return sum(map(str.isdigit, word)) >= 3 and word != word.lower() and word != word.upper()


def _names() -> set[str]:
    """What the person and the machine are called."""
    names = {Path.home().name, socket.gethostname().partition(".")[0]}
    with suppress(OSError, KeyError, ImportError):  # a container's user without a name
        names.add(getpass.getuser())
    return {name.lower() for name in names if len(name) > 2} - COMMON


def public_word(word: str) -> str:
    """A word of a command, or the value of an option, fit for everyone: of a folder its last part, no token.

    A folder may follow `name=`, and several may be joined by commas; blanks belong to them.
    """
    start, equals, value = word.partition("=")
    if equals and not re.search(r"[\\/]", start):
        return f"{start}={'***' if re.fullmatch(f'(?i)-*{SECRET_NAME}', start) else public_word(value)}"
    if "," in word:
        return ",".join(map(public_word, word.split(",")))
    if TOKEN.search(word) or (LONG.fullmatch(word) and _is_random(word)):
        return "***"
    if re.match(r"(?:file:/+|~[\w.-]*)?/|~", word) and "://" not in word.removeprefix("file://"):
        return PurePosixPath(word).name or word
    return PureWindowsPath(word).name if re.match(r"[A-Za-z]:[\\/]|\\\\", word) else word


def public_command(words: Sequence[str]) -> str:
    """A command line from its words, each as `public_word` has it; what follows a `--token` is `***`."""
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_secret = re.fullmatch(f"(?i)-*{SECRET_NAME}", before) and not word.startswith("-")
        shown.append("***" if is_secret else public_word(word))
    return " ".join(word if word == "***" else shlex.quote(word) for word in shown)
