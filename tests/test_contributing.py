"""The worked examples of CONTRIBUTING.md run as they stand: a file, a line in its registry, and its tests."""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
REGISTRIES = {
    "hf_compress/distillation/__init__.py": "hf_compress.distillation",
    "hf_compress/pruning/methods/weights.py": "hf_compress.pruning.methods.weights",
    "hf_compress/quantization/codebooks.py": "hf_compress.quantization.codebooks",
}


def examples():
    """(kind, [method, line, test]) of each section."""
    sections = PAGE.read_text(encoding="utf-8").split("\n### A ")[1:]
    return [(part.split(" ")[0], re.findall(r"```python\n# (.*?)\n(.*?)```", part, re.S)) for part in sections]


EXAMPLES = examples()


@pytest.mark.parametrize("kind, files", EXAMPLES, ids=[kind for kind, _ in EXAMPLES])
def test_an_example_is_three_files_that_work(kind, files, tmp_path, monkeypatch):
    (path, method), (where, line), (test_path, test) = files
    module = ModuleType(path.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and imports look
    exec(compile(method, path, "exec"), vars(module))
    registry, name = re.fullmatch(r"(\S+), in (\w+)", where).groups()
    home = import_module(REGISTRIES[registry])
    for key, value in eval(f"{{{line}}}", {**vars(home), **vars(module)}).items():
        monkeypatch.setitem(getattr(home, name), key, value)
        if kind == "distillation":  # names, which the command line and the recipes look up
            assert all(hasattr(import_module(value[0]), name) for name in value[1:])
    tests = {}
    exec(compile(test, test_path, "exec"), tests)
    names = [name for name in tests if name.startswith("test_")]
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        wanted = inspect.signature(tests[name]).parameters
        tests[name](**({"tmp_path": folder} if wanted else {}))
    assert names and module.__doc__


def test_there_is_one_of_each_kind():
    assert [kind for kind, _ in EXAMPLES] == ["distillation", "pruning", "quantization"]
