"""Lay the kernels out as the `kernels` library loads them, without Nix: for tests and for a look before publishing.

    python scripts/stage_hub.py runs/kernels

The published build comes from `kernel-builder`; this one has the same folders, names and metadata.
Needs Python 3.11.
"""

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

import tomllib

PROJECT = Path(__file__).resolve().parent.parent / "triton_kernels"

OPS = '''"""Namespace of this build's operators."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''

# Lets `import hf_compress_kernels` work from a build folder on the path, as older loaders do.
COMPATIBILITY = '''"""The build itself, under the name of the package."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location("{id}", _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules["{id}"] = _module
_spec.loader.exec_module(_module)
for _name in _module.__all__:
    globals()[_name] = getattr(_module, _name)
__all__ = _module.__all__
'''


def sources(general: dict, extensions: list[str]) -> dict[str, bytes]:
    """Relative path -> content of the package's files."""
    package = PROJECT / "torch-ext" / general["name"].replace("-", "_")
    files = [p for p in sorted(package.rglob("*")) if p.is_file() and p.suffix[1:] in extensions]
    return {p.relative_to(package).as_posix(): p.read_bytes() for p in files if "__pycache__" not in p.parts}


def stage(output: Path) -> Path:
    """Write `output/build/torch-<backend>/...` and the card; returns `output`. An earlier build there is replaced."""
    build = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))
    general = build["general"]
    package = general["name"].replace("-", "_")
    files = sources(general, build["torch-noarch"]["pyext"])
    content = hashlib.sha256(b"".join(name.encode() + data for name, data in files.items())).hexdigest()[:7]
    shutil.rmtree(output / "build", ignore_errors=True)
    for backend in general["backends"]:
        build_id = f"_{package}_{backend}_{content}"
        variant = {
            **files,
            "_ops.py": OPS.format(id=build_id).encode(),
            f"{package}/__init__.py": COMPATIBILITY.format(id=build_id).encode(),
        }
        metadata = {
            "name": general["name"],
            "id": build_id,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {n: base64.b64encode(hashlib.sha256(d).digest()).decode() for n, d in sorted(variant.items())},
            },
        }
        folder = output / "build" / f"torch-{backend}"
        for name, data in {**variant, "metadata.json": json.dumps(metadata, indent=2).encode()}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    shutil.copy(PROJECT / "CARD.md", output / "README.md")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="Folder to write to.")
    output = stage(parser.parse_args().output)
    for variant in sorted((output / "build").iterdir()):
        print(f"{variant}: {json.loads((variant / 'metadata.json').read_text(encoding='utf-8'))['id']}")


if __name__ == "__main__":
    main()
