"""The rules of the package as a whole: who may import whom, what lives where, what is light and declared."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import sparsessm

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/sparsessm"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

# docs/design.md, "Who may import whom": arrows never point upwards, and never in a circle.
FLOORS = {
    6: {"__init__", "__main__", "cli", "demo", "tables"},
    5: {
        "advice",
        "depth",
        "analysis",
        "findings",
        "inventory",
        "mixture",
        "pipeline",
        "projection",
        "widths",
        "shrinking",
        "structure",
        "trials",
        "yardstick",
    },
    4: {"choice", "plan", "recipe", "units"},
    3: {"methods", "calibrate", "curvature", "runtime"},
    2: {
        "observers",
        "patterns",
        "allocation",
        "compensate",
        "checkpoint",
        "evaluation",
        "scores",
        "zero_shot",
    },
    1: {
        "architectures",
        "card",
        "data",
        "edition",
        "foreign",
        "hessian",
        "inert",
        "kernels",
        "machine",
        "report",
        "text_files",
        "unfinished",
    },
}
FLOOR = {unit: floor for floor, units in FLOORS.items() for unit in units}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "manager", "factory", "session"}
HOMES = {  # module -> the only units that may import it
    "transformers": {"architectures", "checkpoint", "runtime"},
    "huggingface_hub": {"checkpoint"},
    "safetensors": {"checkpoint"},
    "datasets": {"data"},
    "pyarrow": {"text_files"},
    "lm_eval": {"zero_shot"},
    "typer": {"cli"},
    "rich": {"cli", "tables"},
    "yaml": {"foreign", "cli"},
}


def unit(file: Path) -> str:
    """The file or folder right below the package that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Full dotted names of all that is imported anywhere in a file of `package`, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = (*base, *(node.module.split(".") if node.module else ()))
            yield from (".".join((*parts, alias.name)) for alias in node.names)


def imported(file: Path) -> list[str]:
    return list(imports(TREES[file], ("sparsessm", *file.relative_to(SOURCE).parts[:-1])))


def inner_units(file: Path) -> set[str]:
    """The units of this package that a file imports, its own excepted."""
    names = [name.split(".") for name in imported(file)]
    found = {
        parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"
        for parts in names
        if parts[0] == "sparsessm"
    }
    return found - {unit(file)}


def test_the_reader_of_imports() -> None:
    code = "import a.b\nfrom . import x\nfrom ..y import z\ndef f():\n    from sparsessm.q import r\n"
    names = list(imports(ast.parse(code), ("sparsessm", "methods")))
    assert sorted(names) == ["a.b", "sparsessm.methods.x", "sparsessm.q.r", "sparsessm.y.z"]


def test_every_file_has_a_floor() -> None:
    assert {unit(file) for file in FILES} <= FLOOR.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_arrows_never_point_upwards(file: Path) -> None:
    upwards = {name for name in inner_units(file) if FLOOR[name] > FLOOR[unit(file)]}
    assert not upwards


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        graph.setdefault(unit(file), set()).update(inner_units(file))
    graph["cli"].discard("__init__")  # the command line is a user of the door and of the rooms
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("above", "never"),
    [
        ("methods", {"architectures", "checkpoint", "data"}),  # N + M files, not N x M
        ("architectures", {"methods", "patterns", "observers", "compensate"}),
        ("runtime", FLOOR.keys() - {"kernels", "checkpoint", "architectures"}),
        ("pipeline", {"runtime", "checkpoint"}),  # pruning and running meet on disk
        ("kernels", FLOOR.keys()),
    ],
)
def test_who_never_meets(above: str, never: set[str]) -> None:
    for file in FILES:
        if unit(file) == above:
            assert not inner_units(file) & (set(never) - {above}), file


def test_only_the_kernels_door_imports_the_extension() -> None:
    users = [file for file in FILES if any("_native" in name.split(".") for name in imported(file))]
    assert users == [SOURCE / "kernels/__init__.py"]


@pytest.mark.parametrize("module", HOMES)
def test_a_library_is_imported_only_in_its_home(module: str) -> None:
    users = {unit(file) for file in FILES if any(name.split(".")[0] == module for name in imported(file))}
    assert users <= HOMES[module]


def test_in_the_runtime_one_file_speaks_transformers() -> None:
    users = {file.name for file in FILES if unit(file) == "runtime" and "transformers" in roots(file)}
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
        if unit(file) not in {"cli", "tables"}:
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
