"""The house keeps its shape: imports go one way, importing is cheap, the wheel installs what it should."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_compress"

# From the top of the house to its ground floor: a module may import from its own floor's group and from lower floors.
FLOORS = [
    {"commands"},
    {"recipe"},
    {"distillation", "pruning", "quantization", "report", "hub"},
    {"checkpoint"},
    {"layers"},
    {"surgery", "calibration", "measure", "anatomy", "capture", "ops", "engines", "training_state", "data"},
]
METHOD_FOLDERS = {"distillation", "pruning", "quantization"}


def floor(part: str) -> int:
    """Small helpers of the ground floor are not listed one by one."""
    return next((i for i, parts in enumerate(FLOORS) if part in parts), len(FLOORS) - 1)


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_imported(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("hf_compress.")}


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    part = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for other in parts_imported(file) - {part}:
        assert floor(other) >= floor(part), f"{file.name} of `{part}` imports `{other}`, which lies above it"
        assert not {part, other} <= METHOD_FOLDERS, f"`{part}` imports `{other}`: the method folders stand alone"


def test_only_ops_knows_the_kernels():
    for file in SOURCES:
        if any(name.split(".")[0] == "hf_compress_kernels" for name in imports(file)):
            assert file.name == "ops.py" or "engines" in file.parts, (
                f"{file} imports the kernels past hf_compress/ops.py"
            )


def test_the_kernels_import_nothing_of_ours():
    for file in (ROOT / "triton_kernels" / "torch-ext").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names
        relative = {"", "hf_compress_kernels"}
        tree = ast.parse(file.read_text())
        local = {
            n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level and n.module
        }
        assert outside - local <= {"torch", "triton", *relative}, f"{file} imports {outside - local}"


def test_the_wheel_never_installs_the_name_of_another_project():
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert all(pattern.startswith("hf_compress") for pattern in find["include"])


def test_importing_loads_no_model_code_and_no_engine():
    code = (
        "import torch, transformers.quantizers, sys; before = set(sys.modules); import hf_compress; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = ("transformers.models.", "matplotlib", "triton", "onnxruntime", "datasets", "accelerate", "peft")
    assert not [name for name in loaded if name.startswith(heavy)]


def test_every_public_name_is_there_and_sorted():
    import hf_compress

    assert hf_compress.__all__ == sorted(hf_compress.__all__)
    for name in hf_compress.__all__:
        assert getattr(hf_compress, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_compress.nothing
