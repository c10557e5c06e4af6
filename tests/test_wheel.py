"""The wheel that is built holds all that the package needs, and runs where no source tree is."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_compress.commands.main import VERBS
from hf_compress.recipe import ready_recipes
from hf_compress.version import __version__

ROOT = Path(__file__).parent.parent
BUILT = ("hf_compress", "scripts/hf_compress_cli", "triton_kernels", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.long
def test_a_wheel_is_built_installed_and_run(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in BUILT:  # a copy: building leaves files behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"hf_compress-{__version__}-")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in inside if ".dist-info" not in name} == {
        "hf_compress",
        "hf_compress_cli",
        "hf_compress_kernels",
    }
    assert {f"hf_compress/recipe/ready/{name}.yaml" for name in ready_recipes()} <= set(inside)
    assert {f"hf_compress_cli/texts/{verb}.txt" for verb in VERBS} <= set(inside)
    assert {"hf_compress/py.typed", "hf_compress/__init__.pyi"} <= set(inside)
    assert {"hf_compress/report/page.html.j2", "hf_compress/report/card.md.j2"} <= set(inside)
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hf_compress; from hf_compress.commands.main import main; "
    )
    code += "print(hf_compress.__file__); main(['--version']); main(['run', '--help'])"
    said = subprocess.run([sys.executable, "-I", "-c", code, str(target)], capture_output=True, text=True, check=True,
                          cwd=tmp_path).stdout  # fmt: skip
    assert said.startswith(str(target)) and f"hf_compress {__version__}\n" in said and "few-labels" in said
