"""Help, version and completion are said without PyTorch, and say what the parsers would."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from hf_compress.commands.doctor import TESTED
from hf_compress.commands.main import VERBS, main, usage
from hf_compress.recipe import ready_recipes
from hf_compress.version import __version__
from hf_compress_cli import said_at_once

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(transformers.__version__ != TESTED["transformers"], reason="kept for the options of this version")
def test_the_kept_texts_are_what_the_parsers_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("COLUMNS", "80")
    from write_texts import texts

    from hf_compress_cli import TEXTS

    made = texts()
    assert {path.stem for path in TEXTS.glob("*.txt")} == made.keys()
    for name, text in made.items():  # each Python breaks the lines in its own way
        kept = (TEXTS / f"{name}.txt").read_text(encoding="utf-8")
        assert kept.split() == text.split(), f"{name}: run python scripts/write_texts.py"


@pytest.mark.parametrize("line", ["--help", "--version", "distil --help", "completion zsh"])
def test_nothing_heavy_is_imported_for_them(line):
    code = "import sys; from hf_compress_cli import entry_point; entry_point(); print(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=True, cwd=ROOT
    )
    *text, modules = said.stdout.splitlines()
    assert text and not {"torch", "transformers", "numpy", "hf_compress"} & set(modules.split())


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_is_kept(verb):
    text = said_at_once([verb, "--help"])
    assert text.startswith(f"usage: hf-compress {verb}") and "\nExample:\n  hf-compress " in text
    assert said_at_once([verb, "-h"]) == text


def test_what_is_not_kept_is_left_to_the_parsers():
    assert said_at_once(["--version"]) == f"hf_compress {__version__}\n" and said_at_once([]) == usage()
    others = (["nonsense", "--help"], ["completion", "fish"], ["../usage", "--help"], ["run", "mine.yaml"],
              ["distill", "--method", "tinybert", "--help"], ["--help", "--verbose"])  # fmt: skip
    assert not any(map(said_at_once, others))


COMPLETED = [
    ("", set(VERBS)),
    ("pr", {"prune"}),
    ("finetune --learn", {"--learning_rate"}),
    ("fine-tune --meth", set()),
    ("distil --method tiny", {"tinybert"}),
    ("distill --method tinybert --intermediate_s", {"--intermediate_share", "--intermediate_size"}),
    ("distil --method tinybert --intermediate-s", {"--intermediate-share", "--intermediate-size"}),
    ("quantize --group", {"--group_size"}),
    ("shrink bert --runtime open", {"openvino"}),
    ("convert a b --format gg", {"gguf"}),
    ("evaluate m --task causal", {"causal-lm"}),
    ("run few", {"few-labels"}),
    ("run mine.yaml --da", {"--data", "--dataset_name"}),
    ("run ", set(ready_recipes())),
    ("evaluate some-fol", set()),
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_methods_options_and_values():
    """All in one shell. `set -u` would say that a variable is not there."""
    tries = []
    for line, _ in COMPLETED:
        words = ["hf-compress", *line.split(" ")]
        listed = " ".join(f"'{word}'" for word in words)
        tries.append(f'COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _hf_compress; echo "${{COMPREPLY[*]}}"')
    code = "\n".join(["set -u", said_at_once(["completion", "bash"]), *tries])
    ran = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert not ran.stderr
    for (line, expected), found in zip(COMPLETED, ran.stdout.splitlines(), strict=True):
        assert set(found.split()) == expected, line


def test_zsh_reads_the_script_of_bash():
    first, _, rest = said_at_once(["completion", "zsh"]).partition("\n")
    assert first == "autoload -U +X bashcompinit && bashcompinit" and rest == said_at_once(["completion", "bash"])


def test_another_shell_is_refused(capsys):
    assert main(["completion", "fish"]) == 2 and "bash" in capsys.readouterr().err
