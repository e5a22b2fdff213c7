"""Draw the house: which room imports which, floor by floor, and how many arrows that makes.

    python tools/rooms.py

A room is a folder of `src/sparsessm` (or a file right below it), `bench/` or `tools/`. An arrow is an import
from one room into another, wherever it stands in a file. Exits with 1 where an arrow points upwards or along
a floor, and where imports go in a circle, between rooms or inside one. tests/test_package.py asks the same
functions.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/sparsessm"
DOOR = "__init__"
# Arrows point to a lower floor. `__main__` is a second name of the command line.
FLOORS: dict[int, set[str]] = {
    8: {"cli", "__main__", "bench", "tools"},
    7: {DOOR, "serving"},
    6: {"studies"},
    5: {"pruning", "evaluation"},
    4: {"report", "runtime"},
    3: {"recipe", "calibration", "checkpoint"},
    2: {"methods", "architectures"},
    1: {"kernels", "data"},
    0: {"builtin"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def files() -> list[Path]:
    """All Python files of the rooms."""
    return sorted(file for top in (SOURCE, ROOT / "bench", ROOT / "tools") for file in top.rglob("*.py"))


def room(file: Path) -> str:
    """The room that a file lies in."""
    if SOURCE in file.parents:
        return file.relative_to(SOURCE).parts[0].removesuffix(".py")
    return file.relative_to(ROOT).parts[0]


def module(file: Path) -> str:
    """The dotted name of a file, as it is imported."""
    if SOURCE not in file.parents:
        return file.stem
    parts = ("sparsessm", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Full dotted names of all that is imported anywhere in a file of `package`, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = (*base, *(node.module.split(".") if node.module else ()))
            yield from (".".join((*parts, alias.name)) for alias in node.names)


@cache
def imported(file: Path) -> set[str]:
    """Full dotted names of all that a file imports."""
    package = ("sparsessm", *file.relative_to(SOURCE).parts[:-1]) if SOURCE in file.parents else ()
    return set(imports(ast.parse(file.read_text(encoding="utf-8")), package))


def used(file: Path, modules: dict[str, Path]) -> set[Path]:
    """The files that a file imports from; of a name that a file defines, that file."""
    found = set()
    for name in imported(file):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if name:
            found.add(modules[name])
    return found - {file}


@cache
def graph() -> dict[Path, set[Path]]:
    """Each file with the files that it imports from."""
    modules = {module(file): file for file in files()}
    return {file: used(file, modules) for file in modules.values()}


def arrows(drawn: dict[Path, set[Path]]) -> dict[str, set[str]]:
    """Each room with the rooms that it imports from."""
    found: dict[str, set[str]] = defaultdict(set)
    for file, others in drawn.items():
        found[room(file)] |= {room(other) for other in others} - {room(file)}
    return found


def upwards(drawn: dict[str, set[str]]) -> list[str]:
    """Arrows between rooms that do not point to a lower floor."""
    return [
        f"{above} -> {below}"
        for above, others in sorted(drawn.items())
        for below in sorted(others)
        if FLOOR[below] >= FLOOR[above] and (above, below) != ("__main__", "cli")
    ]


def circle(drawn: dict[Path, set[Path]], inside: str) -> list[str]:
    """Files of a room that import one another in a circle; empty where there is none.

    A folder's own `__init__` is its door: its files may not ask it for what it gathers from them.
    """
    own = {file: {other for other in others if room(other) == inside} for file, others in drawn.items()}
    try:
        list(TopologicalSorter({file: own[file] for file in own if room(file) == inside}).static_order())
    except CycleError as error:
        return [file.name for file in error.args[1]]
    return []


def main() -> int:
    """Print the house; returns the exit code."""
    drawn = graph()
    between = arrows(drawn)
    for floor, rooms in FLOORS.items():
        for name in sorted(rooms & {*between}):
            print(f"{floor}  {name:14} -> {', '.join(sorted(between[name])) or '(nothing)'}")
    wrong = upwards(between)
    circles = [" -> ".join(found) for name in sorted(between) if (found := circle(drawn, name))]
    print(*(f"upwards: {arrow}" for arrow in wrong), *(f"circle: {names}" for names in circles), sep="\n")
    count = sum(map(len, between.values()))
    print(f"{len(between)} rooms, {count} arrows, {len(wrong)} of them upwards, {len(circles)} circles")
    return 1 if wrong or circles else 0


if __name__ == "__main__":
    sys.exit(main())
