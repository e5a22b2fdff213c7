"""The rules of the package as a whole: who may import whom, what lives where, what is light and declared."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import sparsessm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import rooms  # noqa: E402
from rooms import room  # noqa: E402

SOURCE = ROOT / "src/sparsessm"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "manager", "factory", "session"}
HOMES = {  # module -> the only units that may import it
    "transformers": {"architectures", "checkpoint", "runtime"},
    "huggingface_hub": {"checkpoint"},
    "safetensors": {"checkpoint"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "lm_eval": {"evaluation"},
    "typer": {"cli"},
    "rich": {"cli"},
    "yaml": {"data", "cli"},
}


def imported(file: Path) -> set[str]:
    return rooms.imported(file)


def test_the_reader_of_imports() -> None:
    code = "import a.b\nfrom . import x\nfrom ..y import z\ndef f():\n    from sparsessm.q import r\n"
    names = list(rooms.imports(ast.parse(code), ("sparsessm", "methods")))
    assert sorted(names) == ["a.b", "sparsessm.methods.x", "sparsessm.q.r", "sparsessm.y.z"]


def test_the_names_at_the_top_are_few_and_have_a_floor() -> None:
    names = {room(file) for file in FILES}
    assert len(names) <= 16 and names <= rooms.FLOOR.keys()


def test_arrows_between_rooms_point_downwards_and_are_few() -> None:
    drawn = rooms.arrows(rooms.graph())
    assert not rooms.upwards(drawn)
    assert len(drawn) <= 18 and sum(map(len, drawn.values())) <= 80


@pytest.mark.parametrize("inside", sorted({room(file) for file in FILES}))
def test_no_circle_inside_a_room(inside: str) -> None:
    assert not rooms.circle(rooms.graph(), inside)


def test_an_arrow_upwards_and_a_circle_are_found() -> None:
    walk, entries = SOURCE / "calibration/walk.py", SOURCE / "pruning/entries.py"
    drawn = {walk: {entries}, entries: {walk}}
    assert rooms.upwards(rooms.arrows(drawn)) == ["calibration -> pruning"]
    loss = SOURCE / "calibration/loss.py"
    assert rooms.circle({walk: {loss}, loss: {walk}}, "calibration")
    assert not rooms.circle(drawn, "calibration")


@pytest.mark.parametrize(
    ("above", "never"),
    [
        ("methods", {"architectures", "checkpoint", "data"}),  # N + M files, not N x M
        ("architectures", {"methods"}),
        ("runtime", rooms.FLOOR.keys() - {"kernels", "checkpoint", "architectures"}),
        ("pruning", {"runtime", "checkpoint"}),  # pruning and running meet on disk
        ("kernels", rooms.FLOOR.keys()),
    ],
)
def test_who_never_meets(above: str, never: set[str]) -> None:
    for file, others in rooms.graph().items():
        if room(file) == above:
            assert not {room(other) for other in others} & (set(never) - {above}), file


def test_only_the_kernels_door_imports_the_extension() -> None:
    users = [file for file in FILES if any("_native" in name.split(".") for name in imported(file))]
    assert users == [SOURCE / "kernels/__init__.py"]


@pytest.mark.parametrize("module", HOMES)
def test_a_library_is_imported_only_in_its_home(module: str) -> None:
    users = {room(file) for file in FILES if any(name.split(".")[0] == module for name in imported(file))}
    assert users <= HOMES[module]


def test_in_the_runtime_one_file_speaks_transformers() -> None:
    users = {file.name for file in FILES if room(file) == "runtime" and "transformers" in roots(file)}
    assert users == {"causal_lm.py"}


def roots(file: Path) -> set[str]:
    """The top-level modules that a file imports."""
    return {name.split(".")[0] for name in imported(file)}


def test_no_star_imports() -> None:
    assert not [file for file in FILES if any(name.endswith(".*") for name in imported(file))]


def names_used(tree: ast.AST) -> set[str]:
    """Plain names that are called, and dotted names of two parts."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            used.add(node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{node.value.id}.{node.attr}")
    return used


def test_the_terminal_the_environment_and_seeds_belong_to_the_command_line() -> None:
    own = {"print", "input", "exit", "sys.argv", "sys.stdout", "sys.stderr", "sys.exit"}
    own |= {"os.environ", "os.getenv", "torch.manual_seed", "random.seed"}
    # One variable is read elsewhere: the kernels' level must be held before anything runs, from Python too.
    level = {SOURCE / "kernels/level.py": {"os.environ"}}
    for file in FILES:
        if room(file) != "cli":
            assert names_used(TREES[file]) & own == level.get(file, set()), file
    assert variables(SOURCE / "kernels/level.py") == {"SPARSESSM_KERNELS"}
    assert names_used(ast.parse("print(1); sys.argv[1]")) == {"print", "sys.argv"}


def variables(file: Path) -> set[str]:
    """The environment variables that a file reads with `os.environ.get`."""
    return {
        call.args[0].value
        for call in ast.walk(TREES[file])
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "os.environ.get"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def test_forbidden_names() -> None:
    parts = {part for file in SOURCE.rglob("*") for part in file.relative_to(SOURCE).with_suffix("").parts}
    assert not parts & FORBIDDEN_NAMES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_file_says_what_it_is_and_stays_short(file: Path) -> None:
    assert ast.get_docstring(TREES[file])
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def test_importing_is_light() -> None:
    code = "import sys, sparsessm, sparsessm.runtime\n"
    code += "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "numpy", "pydantic", "typer", "rich"} & set(ast.literal_eval(loaded))


def test_the_door() -> None:
    assert {"load", "prune", "evaluate", "save"} <= set(sparsessm.__all__)
    for name in sparsessm.__all__:
        assert getattr(sparsessm, name).__doc__


def test_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version("sparsessm") == project["version"] == sparsessm.__version__
    assert (ROOT / "CHANGELOG.md").read_text().count(f"## {project['version']}") == 1
    assert (SOURCE / "py.typed").exists()
    (script,) = entry_points(group="console_scripts", name="sparsessm")
    assert callable(script.load())
    pins = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {name for name, equals, _ in pins if equals}
    required = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {requirement.split(">=")[0].partition("[")[0] for requirement in required}
    assert declared <= pinned
