"""The house keeps its shape: imports go one way, importing is cheap, the wheel installs what it should."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_compress"

# From the top of the house to its ground floor: a room may import from its own floor and from lower floors.
FLOORS = [
    {"commands"},
    {"shrinking"},
    {"recipe", "publishing"},
    {"distillation", "pruning", "quantization", "report"},
    {"formats", "training", "measuring"},
    {"checkpoint"},
    {"layers"},
    {"engines"},
    {"model", "surgery"},
    {"version", "files"},
]
METHOD_FOLDERS = {"distillation", "pruning", "quantization"}


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_imported(file: Path) -> set[str]:
    rooms = {path.stem for path in PACKAGE.iterdir()}
    return {name.split(".")[1] for name in imports(file) if name.startswith("hf_compress.")} & rooms


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def modules_imported() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, also inside functions."""
    modules = {module_name(file): file for file in SOURCES}
    graph = {}
    for name, file in modules.items():
        found = (imports(file) & modules.keys()) - {name}
        # `from room import module` names both: the module is meant
        graph[name] = {one for one in found if not any(other.startswith(f"{one}.") for other in found)}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if circle := walk(other, [*path, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := walk(node, []))), [])


def test_there_is_no_circle():
    assert not find_circle(modules_imported())


def test_a_circle_would_be_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert not find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_rooms_are_few_and_small():
    rooms = [path.parent for path in PACKAGE.rglob("__init__.py")]
    assert len(rooms) <= 26
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "version.py"}
    for room in rooms:
        assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= 16, room.name


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    part = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for other in parts_imported(file) - {part}:
        assert floor(other) >= floor(part), f"{file.name} of `{part}` imports `{other}`, which lies above it"
        assert not {part, other} <= METHOD_FOLDERS, f"`{part}` imports `{other}`: the method folders stand alone"


def text_calls_without_encoding(source: str) -> list[int]:
    """Lines that read or write text in the encoding of whatever machine they run on; ruff sees known paths only."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        mode = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_text = name in ("read_text", "write_text") or (
            name in ("open", "fdopen") and any(set(m) <= set("rwax+t") for m in mode)
        )
        if is_text and not any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            found.append(node.lineno)
    return found


def test_text_is_utf_8_on_every_machine():
    for folder in ("hf_compress", "scripts", "triton_kernels", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not text_calls_without_encoding(file.read_text(encoding="utf-8")), file


def test_text_without_encoding_would_be_found():
    assert text_calls_without_encoding('a.write_text("x")\nb.read_text()\nc.open("a")\nos.fdopen(1, "w")') == [
        1,
        2,
        3,
        4,
    ]
    assert text_calls_without_encoding('a.write_text("x", encoding="utf-8")\nb.open("rb")') == []


POSIX = {"os.fork(": "needs_fork", "SIGKILL": "needs_fork", "/proc/": "needs_proc", "fuzz_apart": "needs_proc"}


def test_what_not_every_machine_has_is_asked_for_first():
    """Modules of tests, that is: what they call says what it needs."""
    for file in (ROOT / "tests").rglob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        for name, mark in POSIX.items():
            assert name not in text or mark in text or file == Path(__file__), f"{file} has {name!r} without {mark}"
    for folder in ("hf_compress", "triton_kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not {"resource", "fcntl", "pwd", "signal"} & imports(file), f"{file}: Windows has none of it"
            assert "os.fork" not in text and '"/tmp' not in text, file


def test_the_workflow_runs_what_a_person_runs():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    machines, pythons = job["strategy"]["matrix"]["machine"], job["strategy"]["matrix"]["python"]
    assert [name for name in ("arm", "macos", "windows") if not any(name in machine for machine in machines)] == []
    assert "3.10" in pythons and all(isinstance(version, str) for version in pythons)
    assert job["defaults"]["run"]["shell"] == "bash" and job["steps"][-1]["run"] == ".ci/run"
    assert "eol=lf" in (ROOT / ".gitattributes").read_text(encoding="utf-8")


def test_only_ops_knows_the_kernels():
    for file in SOURCES:
        if any(name.split(".")[0] == "hf_compress_kernels" for name in imports(file)):
            assert file.name == "ops.py" or "engines" in file.parts, (
                f"{file} imports the kernels past hf_compress/engines/ops.py"
            )


def test_the_kernels_import_nothing_of_ours():
    for file in (ROOT / "triton_kernels" / "torch-ext").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names
        relative = {"", "hf_compress_kernels"}
        tree = ast.parse(file.read_text(encoding="utf-8"))
        local = {
            n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level and n.module
        }
        assert outside - local <= {"torch", "triton", *relative}, f"{file} imports {outside - local}"


def test_the_wheel_never_installs_the_name_of_another_project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    find = tools["setuptools"]["packages"]["find"]
    assert all(pattern.startswith("hf_compress") for pattern in find["include"])


def test_importing_loads_nothing_of_others():
    """No model code, no engine: nothing that its loader's two imports have not loaded."""
    code = (
        "import torch, transformers.quantizers, sys; before = set(sys.modules); import hf_compress; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if not name.startswith("hf_compress")] == []


def test_every_public_name_is_there_and_sorted():
    import hf_compress

    assert hf_compress.__all__ == sorted(hf_compress.__all__)
    for name in hf_compress.__all__:
        assert getattr(hf_compress, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_compress.nothing
