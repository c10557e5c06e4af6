"""Publish the kernels on the Hub, after checking that what would be published loads and says what it is.

    python scripts/publish_kernels.py --dry-run             # build, check and list; nothing leaves the machine
    python scripts/publish_kernels.py --repo-id me/kernels  # upload the staged build to branch v<version>

Signed builds come from `kernel-builder build-and-upload` (Nix) in `triton_kernels/`; this script needs neither Nix nor
a compiler, as the kernels are Python. Refuses to publish from a tree with uncommitted changes. Needs Python 3.11.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_compress.publishing.upload import HubError, HubPermissionError, upload  # noqa: E402
from scripts.stage_hub import PROJECT, stage  # noqa: E402


def check_tree() -> None:
    """Raise RuntimeError when `triton_kernels` differs from the last commit."""
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", "triton_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if status.stdout:
        raise RuntimeError(f"Commit first; triton_kernels has changes:\n{status.stdout}")


def check_build(build: Path) -> None:
    """Load every public name from the build in a fresh process. Raises CalledProcessError when that fails."""
    code = (
        "import sys; from pathlib import Path; from kernels import get_local_kernel\n"
        "module = get_local_kernel(Path(sys.argv[1]), backend='cpu')\n"
        "missing = [name for name in module.__all__ if not hasattr(module, name)]\n"
        "assert not missing, missing"
    )
    subprocess.run([sys.executable, "-c", code, str(build)], check=True)


def main() -> int:
    general = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))["general"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo-id", default=general["hub"]["repo-id"], help="Where to publish. Default: build.toml's.")
    parser.add_argument("--dry-run", action="store_true", help="Build and check, upload nothing.")
    args = parser.parse_args()

    if not args.dry_run:
        check_tree()
    with tempfile.TemporaryDirectory() as folder:
        build = stage(Path(folder))
        check_build(build)
        files = sorted(path for path in build.rglob("*") if path.is_file())
        for path in files:
            print(f"{path.stat().st_size:8d}  {path.relative_to(build)}")
        print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes, version {general['version']}")
        if args.dry_run:
            print(f"Dry run: nothing was sent to {args.repo_id}.")
        else:
            version = general["version"]
            try:
                print(upload(build, args.repo_id, private=None, repo_type="kernel", revision=f"v{version}",
                             message=f"Build of version {version}", replaces="build"))  # fmt: skip
            except HubError as error:
                print(error, file=sys.stderr)
                return 2 if isinstance(error, HubPermissionError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
