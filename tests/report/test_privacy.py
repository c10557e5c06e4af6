"""Leaks are found in whatever way they are spelled, words of tokenizers and pages are left in peace."""

import getpass
import re
import socket

import pytest

from hf_compress.report import leak_patterns
from hf_compress.report.privacy import IN_ALL, find_leaks, public_command, public_word

try:
    from re import _parser as sre
except ImportError:  # Python 3.10
    import sre_parse as sre

RANDOM = "aB3dE5fG7hJ9kL1mN3pQ"
HEX = "0123456789abcdef" * 2
LEAKS = {
    "home folder": [
        "/home/anna/models",
        "see /Users/Anna/x.py",
        "C:\\Users\\anna\\model",
        "C:\\\\Users\\\\anna",
        "C:/Users/anna/x",
        "/c/Users/anna/x",
        "/mnt/c/Users/anna/x",
        "file:///home/anna/x",
        "%2Fhome%2Fanna%2Fx",
        "\\/home\\/anna\\/x",
        "~/models",
        "~anna/x",
        "/root/models",
        "/HOME/ANNA/x",
        "//home//anna//x",
        "--data=/home/anna/a b/x.csv",
        "('/home/anna/my data')",
        "\\u002fhome\\u002fanna\\u002fx",
        "&#47;home&#47;anna",
        "file:///C|/Users/anna",
    ],
    "folder": [
        "/data/customers/acme.csv",
        "/tmp/x/y",
        "D:\\projects\\acme",
        "\\\\server\\share\\x",
        "path=/opt/acme/x",
        "/Volumes/My Disk/x",
        "\\\\wsl$\\Ubuntu\\home\\anna",
        "/export/home/анна/x",
        "/gpfs/users/x",
        "/private/var/folders/ab/x",
        "C:\\Benutzer\\anna",
    ],
    "token": [
        "hf_" + RANDOM * 2,
        "ghp_" + RANDOM * 2,
        "github_pat_" + RANDOM * 2,
        "sk-proj-" + RANDOM * 2,
        "glpat-" + RANDOM,
        "xoxb-1234567890-" + RANDOM,
        "AKIAABCDEFGHIJKLMNOP",
        "AIza" + RANDOM * 2,
        f"eyJ{RANDOM}.eyJ{RANDOM}.{RANDOM}",
        "-----BEGIN RSA PRIVATE KEY-----",
        "Authorization: Bearer abcdefghijk",
        "https://anna:secret1@example.org/x",
        "--hub_token abcdefgh",
        "--token=abcdefgh",
        '"api_key": "abcdefgh"',
        "WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567",
        "password: hunter22",
        RANDOM,
        f"key is {RANDOM}!",
        "https://hooks.slack.com/services/T00/B00/XXXXXXXXXXXX",
        "https://discord.com/api/webhooks/108645678901234567/aBcD-eFgH",
        "123456789:AAF-abcdefGHIJKLmnopQRSTuvwxYZ12345",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "AccountName=acme;AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50==;x=y",
        f"{HEX}-us12",
        f"dapi{HEX}",
        f"gldt-{RANDOM}",
        f"glsa_{HEX}_01234567",
        f"dop_v1_{HEX}{HEX}",
        f"GOCSPX-{RANDOM}",
        f"1//0g{RANDOM}",
        f"lin_api_{RANDOM}",
        f"xai-{RANDOM}",
        f"hvs.CAESI{RANDOM}",
        f"unknown_maker_{RANDOM}",
        f'"username": "anna", "key": "{HEX}"',
        "abcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqrst",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----",
        "Authorization: Basic YW5uYTpzZWNyZXQ=",
        "Authorization: token abcdef1234567890",
        "Cookie: session=abcdef",
        "https://example.org/x?token=abcdef123456",
        f"https://b.example.org/k?X-Amz-Signature={HEX}{HEX}",
        "https://abcdef1234567890abcdef@github.com/x/y",
        "redis://:hunter2@build:6379",
        "OPENAI_KEY=abcdef123456",
        "pwd: hunter22",
        "token: abcdef123456",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB anna",
    ],
    "mail address": ["ask anna@example.org", "mailto:anna@example.org", "<anna.b+c@sub.example.co.uk>"],
    "private address": [
        "http://localhost:8080/x",
        "10.1.2.3",
        "192.168.0.7:80",
        "http://build/x",
        "https://git.acme.corp/x",
        "s3://acme-bucket/x",
        "hdfs://name/x",
        "models.internal",
        "169.254.169.254",
        "100.64.0.1",
        "fe80::1",
        "http://[fd00::1]:80/x",
        "printer.home.arpa",
        "vscode-remote://ssh-remote+build/x",
        "build7:/exports/acme/x",
    ],
}


@pytest.mark.parametrize("kind, text", [(kind, text) for kind, texts in LEAKS.items() for text in texts], ids=str)
def test_a_leak_is_found_with_its_line(kind, text):
    (first, *_) = find_leaks(f"fine\n{text}\nfine")
    assert (first.kind, first.line) == (kind, 2)
    assert find_leaks(f"fine\n{text}\nfine", allow=[leak.text for leak in find_leaks(text)]) == []


HARMLESS = [
    "<s> </s> [/INST] <</SYS>> </think> <pad> /no_think and/or 3/4 a/b/c w/o",
    '"eos_token": "</s>", "pad_token": "<pad>"',
    '"bos_token_id": 0, "eos_token_id": [1, 2]',
    "https://huggingface.co/docs/hub/home/page#a",
    "org/name 46/s",
    "{{ '\\n\\n' }}{{ bos_token + '<|im_start|>' }}",
    "Wav2Vec2ForSequenceClassification",
    "bert-base-uncased-finetuned-sst-2",
    "torch 2.13.0, transformers 5.23.0, python 3.11.2",
    "AMD EPYC 7302 16-Core Processor (CPU)",
    "0a1b2c3d" * 8,
    "def f(x): return x  # ok",
    '<path d="M 3 4 L 5 6"/></svg>',
    "url(#a) a { color: #222; }",
    "data:image/png;base64,iVBORw0KGgo/home/anna/AAAA1B2c3D4e5F6g7H8==",
    "x --epochs 3 - hf_compress",
    "1:2,2:4",
    "Reviews, test",
    "--learning_rate 1e-4",
    "token-classification",
    "5.2 tokens a second",
    "secret santa is a game",
    "gradients pass straight through; pass resume_from_checkpoint=True; password protection",
    "from hf_compress.formats.runtimes.folder import agreement",
    "https://api.securityscorecards.dev/projects",
    '"token": "<|reserved_special_token_128>", "key": "value"',
    "Basic classification of texts, a basic understanding",
    "layers: bert.encoder.layer.11.attention.self.query",
    "sk-learn, rk-nearest-neighbours-of-words",
    "microsoft/mdeberta-v3-base and sentence-transformers/all-MiniLM-L6-v2",
]


@pytest.mark.parametrize("text", HARMLESS, ids=str)
def test_what_only_looks_like_one_is_left_in_peace(text):
    assert find_leaks(text) == []


def test_names_of_person_and_machine_are_found_but_not_in_other_words(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "annab")
    monkeypatch.setattr(socket, "gethostname", lambda: "build7.acme.org")
    texts = [leak.text for leak in find_leaks("by AnnaB on build7, annabel, rebuild7")]
    assert texts == ["AnnaB", "build7"]
    assert find_leaks("annab/small", allow=["annab"]) == [] == find_leaks("annab", kinds=IN_ALL)


COMMANDS = [
    (["run", "/home/me/r.yaml", "--data", "/home/my folder/a b.csv"], "run r.yaml --data 'a b.csv'"),
    (["--model=/home/me/my model", "a=~/x,/tmp/y z"], "--model='my model' 'a=x,y z'"),
    (["--token", RANDOM, "--hub_token=abc", "x"], "--token *** '--hub_token=***' x"),
    (["C:\\Users\\me\\my model", "\\\\server\\share\\x"], "'my model' x"),
    (
        ["org/name", "https://example.org/a/b", "--set", "distil.alpha=0.5", "a/b"],
        "org/name https://example.org/a/b --set distil.alpha=0.5 a/b",
    ),
    (["--set", "distil.teacher=/home/me/big one"], "--set 'distil.teacher=big one'"),
]


@pytest.mark.parametrize("words, expected", COMMANDS, ids=[c[1] for c in COMMANDS])
def test_a_command_is_told_without_folders_and_tokens(words, expected):
    assert public_command(words) == expected.replace("--model='my model'", "'--model=my model'")
    assert find_leaks(public_command(words)) == []


PATTERNS = {name: value for name, value in vars(leak_patterns).items() if isinstance(value, re.Pattern)}


@pytest.mark.parametrize("name", PATTERNS)
def test_no_text_takes_long(name):
    """Of a line as long as a book, "a-a-a-" or "sk-sk-", a pattern that may try again at each place makes minutes."""
    assert list(endless(sre.parse(PATTERNS[name].pattern))) == []


def endless(parsed):
    """Repetitions without a bound that something else follows: it is tried at each of their lengths."""
    for place, (kind, value) in enumerate(parsed):
        rest = [after for after, it in parsed[place + 1 :] if str(after) != "MAX_REPEAT" or it[0] > 0]  # what may fail
        if str(kind) in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inside = value
            if high == sre.MAXREPEAT and any(str(after) not in ("ASSERT", "ASSERT_NOT", "AT") for after in rest):
                yield parsed[place : place + 2]
            yield from endless(inside)
        elif str(kind) == "BRANCH":
            for branch in value[1]:
                yield from endless([*branch, *parsed[place + 1 :]])
        elif str(kind) in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            yield from endless([*value[-1], *(parsed[place + 1 :] if str(kind) == "SUBPATTERN" else ())])


def test_a_path_that_is_there_is_told_by_its_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "customers").mkdir()
    (tmp_path / "customers" / "acme.csv").touch()
    found = [public_word(w) for w in ("customers/acme.csv", "org/name", "../customers/a b.csv", "./x", "..\\y", "..")]
    assert found == ["acme.csv", "org/name", "a b.csv", "x", "y", ".."]
    assert public_command(["run", "--data=customers/acme.csv"]) == "run --data=acme.csv"


def test_a_word_without_a_folder_stays():
    assert [public_word(w) for w in ("0.5", "bert", "/", "file:///srv/d", "1:2")] == ["0.5", "bert", "/", "d", "1:2"]
