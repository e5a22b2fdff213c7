"""The laws of the package as a whole: who may import whom, what lives where, what is light and declared.

The laws inside its files: test_laws.py and test_nothing_idle.py."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from sources import OURS, ROOT, SOURCE, TESTS, TREES, place, rooms

import sparsessm

room = rooms.room
FILES = [*OURS]

FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "manager", "factory", "session"}
HOMES = {  # library -> the only rooms, or files and folders of rooms, that may import it
    "transformers": {"architectures", "checkpoint", "runtime/causal_lm.py"},
    "huggingface_hub": {"checkpoint"},
    "safetensors": {"checkpoint"},
    "gguf": {"checkpoint/exporting.py"},
    "datasets": {"data/texts.py"},
    "pyarrow": {"data/text_files.py"},
    "yaml": {"data/foreign.py", "cli"},
    "pydantic": {"recipe", "serving/bodies.py"},
    "fastapi": {"serving/api.py"},
    "uvicorn": {"serving/running.py"},
    "prometheus_client": {"serving/metrics.py"},
    "lm_eval": {"evaluation/tasks.py"},
    "triton": {"kernels/gpu"},
    "matplotlib": {"studies/findings.py", "report/page/pictures.py"},
    "typer": {"cli"},
    "rich": {"cli"},
}
LONGEST = 400  # lines of a file


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
    assert not meetings(rooms.graph(), above, never)


def meetings(drawn: Mapping[Path, set[Path]], above: str, never: Iterable[str]) -> set[str]:
    """Files of a room that import from rooms that they may not know."""
    below = set(never) - {above}
    return {
        file.name for file, others in drawn.items() if room(file) == above and {*map(room, others)} & below
    }


def test_a_meeting_is_found() -> None:
    entries, units, files = (
        SOURCE / name for name in ("pruning/entries.py", "pruning/units.py", "checkpoint/files.py")
    )
    assert meetings({entries: {units}, units: {files}}, "pruning", {"runtime", "checkpoint"}) == {"units.py"}


def test_only_the_kernels_door_imports_the_extension() -> None:
    users = [file for file in FILES if any("_native" in name.split(".") for name in imported(file))]
    assert users == [SOURCE / "kernels/__init__.py"]


def strangers(module: str, users: list[Path]) -> set[str]:
    """Those of the files that use a library that is not at home there."""
    return {
        place(file) for file in users if not {room(file), place(file), place(file.parent)} & HOMES[module]
    }


@pytest.mark.parametrize("module", HOMES)
def test_a_library_is_imported_only_in_its_home(module: str) -> None:
    users = [file for file in FILES if any(name.split(".")[0] == module for name in imported(file))]
    assert users and not strangers(module, users)


def test_a_library_away_from_home_is_found() -> None:
    wrong, right = SOURCE / "runtime/base.py", SOURCE / "runtime/causal_lm.py"
    assert strangers("transformers", [wrong, right]) == {"runtime/base.py"}


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
def test_every_file_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(TREES[file])


def too_long(lines: Mapping[str, int]) -> set[str]:
    return {name for name, count in lines.items() if count > LONGEST}


def test_files_stay_short() -> None:
    files = {file.relative_to(ROOT).as_posix(): file for file in (*TREES, *TESTS)}
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in files.items()}
    assert len(lines) > 200 and not too_long(lines)
    assert too_long({"short.py": LONGEST, "long.py": LONGEST + 1}) == {"long.py"}


def test_no_test_file_needs_another() -> None:
    """What they share lies in modules directly in tests/, and each runs alone, from any folder."""
    names = [file.stem for file in TESTS if file.stem.startswith("test_")]
    assert len(names) == len({*names})
    for file, tree in TESTS.items():
        needed = {name.partition(".")[0] for name in rooms.imports(tree, ())}
        assert not needed & {*names}, file
    assert not [
        file for file in TESTS if file.parent.name != "tests" and file.stem[:5] not in ("test_", "conft")
    ]


def test_tests_have_the_folders_of_the_package() -> None:
    inner = {file.parent.name for file in TESTS if file.parent.name != "tests"}
    assert inner <= {path.name for path in SOURCE.iterdir() if path.is_dir()}


def tree_of(page: str) -> list[str]:
    """The names in the first column of the README's tree."""
    (drawn,) = re.findall(r"^    src/sparsessm/\n((?:      .*\n)+)", page, flags=re.MULTILINE)
    return [line.split()[0].rstrip("/") for line in drawn.splitlines()]


def test_the_readme_draws_the_tree() -> None:
    drawn = tree_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(drawn) <= 18
    assert sorted(name.removesuffix(".py") for name in drawn) == sorted(
        {room(f) for f in FILES} - {"__main__"} | {"builtin"}
    )
    assert tree_of("    src/sparsessm/\n      a.py   one\n      b/  two\nother\n") == ["a.py", "b"]


def test_importing_is_light() -> None:
    code = "import sys, sparsessm, sparsessm.runtime\n"
    code += "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "triton", "transformers", "numpy", "pydantic", "typer", "rich"} & set(
        ast.literal_eval(loaded)
    )


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
