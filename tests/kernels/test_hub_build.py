"""The staged Hub build, loaded the ways that the `kernels` library loads one, each in a process of its own."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kernels")
pytest.importorskip("tomllib", reason="scripts/stage_hub.py needs Python 3.11")
from scripts.stage_hub import PROJECT, stage  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "torch-ext" / "hf_compress_kernels"

USE = """
import torch
ints = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
packed = k.wna16_pack(ints, torch.full((1, 64), 0.5), torch.full((1, 64), 8), 4, -1, torch.float32)
x = torch.randn(3, 128)
torch.testing.assert_close(k.wna16_linear(x, packed), x @ ((ints.float() - 8) * 0.5).T)
assert "hf_compress_kernels" not in __import__("sys").modules
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("kernels"))


def run(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_loads_from_a_folder(build):
    run(
        f"from kernels import get_local_kernel\nfrom pathlib import Path\nk = get_local_kernel(Path({str(build)!r}))"
        + USE
    )


@pytest.mark.long
def test_loads_by_name_where_a_folder_stands_in(build):
    code = 'from kernels import get_kernel\nk = get_kernel("hf-compress/hf-compress-kernels", version=1)'
    run(code + USE, LOCAL_KERNELS=f"hf-compress/hf-compress-kernels={build}")


@pytest.mark.long
def test_two_builds_and_the_package_live_in_one_process(build):
    run(
        "from kernels import get_local_kernel\nfrom pathlib import Path\n"
        f"k = get_local_kernel(Path({str(build)!r}))\n{USE}\n"
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "import hf_compress_kernels\n"
        "assert torch.equal(hf_compress_kernels.wna16_linear(x, packed), k.wna16_linear(x, packed))"
    )


def test_the_door_of_hf_compress_takes_the_build(build):
    code = (
        "from hf_compress.engines import ops\n"
        "assert ops.implementation().__name__.startswith('_hf_compress_kernels_cpu_')\n"
        "from hf_compress.engines.ops import wna16_linear\n"
        "try:\n    ops.no_such_operator\n"
        "except AttributeError as error:\n    assert 'no operator' in str(error)\n"
        "else:\n    raise SystemExit('found what is not there')"
    )
    run(code, HF_COMPRESS_KERNELS=str(build))


@pytest.mark.long
def test_the_door_names_a_source_that_is_nothing():
    code = (
        "from hf_compress.engines import ops\ntry:\n    ops.implementation()\n"
        "except ValueError as error:\n    print(error)"
    )
    assert "must be a folder or owner/name" in run(code, HF_COMPRESS_KERNELS="nothing")


@pytest.mark.parametrize("layer", ["WNA16Linear", pytest.param("BSRLinear", marks=pytest.mark.long)])
def test_kernelize_replaces_the_forward_pass(build, layer):
    run(f"""
import torch
from pathlib import Path
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize
from kernels import use_kernel_forward_from_hub, use_kernel_mapping
k = get_local_kernel(Path({str(build)!r}))

@use_kernel_forward_from_hub({layer!r})
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        ints = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
        self.packed = k.wna16_pack(ints, torch.ones(1, 64), torch.zeros(1, 64), 4, -1, torch.float32)
        self.sparse = k.bsr_from_dense(torch.randn(64, 128), torch.eye(4, 8), (16, 16))
        self.bias = torch.ones(64)
    def forward(self, x):
        raise RuntimeError("the forward pass that should be replaced")

mapping = {{{layer!r}: {{"cpu": LocalLayerRepository(repo_path=Path({str(build)!r}), layer_name={layer!r})}}}}
with use_kernel_mapping(mapping, inherit_mapping=False):
    model = kernelize(torch.nn.Sequential(Layer()), mode=Mode.INFERENCE | Mode.TORCH_COMPILE, device="cpu")
x = torch.randn(2, 128)
layer = model[0]
expected = {{"WNA16Linear": k.wna16_linear(x, layer.packed, layer.bias),
            "BSRLinear": k.bsr_linear(x, layer.sparse, layer.bias)}}[{layer!r}]
assert torch.equal(model(x), expected)
""")


def test_metadata_holds_what_the_loader_reads(build):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for backend in ("cpu", "cuda", "rocm"):
        folder = build / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert metadata.name.python_name == "hf_compress_kernels"
        assert metadata.version == 1
        assert re.fullmatch(rf"_hf_compress_kernels_{backend}_[0-9a-f]{{7}}", metadata.id)
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        assert not json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["python-depends"]


MODULES = sorted(PACKAGE.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_sources_fit_a_build(path):
    """Python 3.9 syntax; imports of torch, Triton, the standard library and the package itself, relatively, only."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        assert all(name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names} for name in names), names
    if "custom_op(" in path.read_text(encoding="utf-8"):  # schemas are read from annotations
        assert "from __future__ import annotations" not in path.read_text(encoding="utf-8")
        assert not re.search(r"custom_op\((?!add_op_namespace_prefix\()", path.read_text(encoding="utf-8"))


def test_public_names_are_sorted_and_there():
    import hf_compress_kernels

    assert hf_compress_kernels.__all__ == sorted(hf_compress_kernels.__all__)
    assert all(hasattr(hf_compress_kernels, name) for name in hf_compress_kernels.__all__)


def test_the_wheel_has_no_module_of_another_project():
    """`triton_kernels` is the import name of a package by others; the folder of that name must not be one of ours."""
    from setuptools import find_packages

    settings = re.search(
        r"\[tool\.setuptools\.packages\.find\]\n((?:.+\n)+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )[1]
    where, include = (json.loads(value) for value in re.findall(r"= (\[.*\])", settings))
    top_level = {name.split(".")[0] for folder in where for name in find_packages(str(ROOT / folder), include=include)}
    assert top_level == {"hf_compress", "hf_compress_cli", "hf_compress_kernels"}


def test_package_imports_without_triton():
    run(f"""
import sys
sys.modules["triton"] = None  # an import of it fails
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.path.insert(0, {str(PACKAGE.parent)!r})
import torch, hf_compress_kernels as k
from hf_compress_kernels import dispatch
assert not dispatch.HAS_TRITON
assert k.kl_from_logits(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
try:
    dispatch.require_triton("wna16_linear")
except ImportError as error:
    assert "pip install triton" in str(error)
else:
    raise SystemExit("no error without Triton")
""")
