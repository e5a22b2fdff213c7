"""No option that nothing reads, no row that no test runs, no name that others use without a docstring."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from sources import OURS, SOURCE, TESTS, TREES, code, functions, place, rooms

import sparsessm
from sparsessm.recipe.recipe import Recipe, RuleFields

# Every option is read somewhere.


def reads(trees: list[ast.Module]) -> Counter[str]:
    """How often code reads an attribute of a name."""
    nodes = (node for tree in trees for node in ast.walk(tree))
    return Counter(n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))


def idle(command: ast.FunctionDef) -> set[str]:
    """Parameters of a command that its body does not read, the fields of a recipe that come together too."""
    names = {node.id for line in command.body for node in ast.walk(line) if isinstance(node, ast.Name)}
    rest = [command.args.kwarg] if command.args.kwarg else []
    return {one.arg for one in (*command.args.args, *command.args.kwonlyargs, *rest)} - names


def test_every_field_of_a_recipe_is_read_outside_of_its_checks() -> None:
    checks = {SOURCE / "recipe/recipe.py", SOURCE / "recipe/fields.py"}
    found = reads([tree for file, tree in OURS.items() if file not in checks])
    fields = {*Recipe.model_fields, *RuleFields.model_fields}
    assert not [field for field in fields if not found[field]]
    assert reads([code("rule.sparsity = recipe.method")]) == {"method": 1}


def test_every_option_of_a_command_is_read() -> None:
    commands = [
        function
        for file, tree in OURS.items()
        if rooms.room(file) == "cli"
        for function in functions(tree)
        if any(
            word in ast.unparse(mark) for mark in function.decorator_list for word in ("command", "callback")
        )
    ]
    assert len(commands) > 8
    for command in commands:
        assert not idle(command), command.name
    (lazy,) = functions(code("def lazy(seed, quiet, out, **given):\n    run(seed, out)"))
    assert idle(lazy) == {"quiet", "given"}


# Every row of every table is run by a test.


def tables(trees: list[ast.Module]) -> set[str]:
    """Names of tables: constants that map names to rows, and functions without arguments that do."""
    found = set()
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id.isupper():
            name, kind = node.target.id, node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns and not node.args.args:
            name, kind = node.name, node.returns
        else:
            continue
        if not name.startswith("_") and ast.unparse(kind).startswith(("Mapping[str,", "dict[str,")):
            found.add(name)
    return found


def gone_through(tree: ast.Module) -> set[str]:
    """Names that tests go through: all rows in a loop, or as parameters; and what constants are made of."""

    def names(*nodes: ast.AST) -> set[str]:
        return {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension):
            found |= names(node.iter)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.parametrize":
            found |= names(*node.args[1:])
    for node in tree.body:
        if isinstance(node, ast.Assign) and names(*node.targets) & found:
            found |= names(node.value)
    return found


def test_every_table_is_gone_through_by_a_test() -> None:
    rows = tables([tree for file, tree in OURS.items() if rooms.room(file) == "methods"])
    assert {"METHODS", "ALLOCATIONS"} <= rows
    assert rows <= set().union(
        *(gone_through(tree) for file, tree in TESTS.items() if file != Path(__file__))
    )
    assert tables([code("GRIDS: Mapping[str, Grid] = {}\nLIMIT: int = 3")]) == {"GRIDS"}
    assert tables([code("def grids() -> dict[str, Grid]: ...\ndef one(name) -> dict[str, int]: ...")]) == {
        "grids"
    }
    assert gone_through(code("GRIDS['nf4'].round(x)")) == set()
    assert gone_through(code("@pytest.mark.parametrize('grid', GRIDS)\ndef f(grid): ...")) == {"GRIDS"}
    assert "grids" in gone_through(code("OURS = grids()\nfor grid in OURS.values(): ..."))


# A name that others use says what it is.

UNDOCUMENTED_TO_DO = {
    "kernels/reference.py: causal_conv1d", "kernels/reference.py: selective_scan", "kernels/ssd.py: ssd_scan",
}  # fmt: skip
MODULES = {rooms.module(file): file for file in OURS}


@cache
def defined(name: str) -> tuple[Path, ast.AST] | None:
    """The class or function behind a full dotted name, also where a folder hands it on."""
    module, _, own = name.rpartition(".")
    if module not in MODULES:
        return None
    file = MODULES[module]
    for node in TREES[file].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == own:
            return file, node
        if isinstance(node, ast.ImportFrom) and own in {alias.asname or alias.name for alias in node.names}:
            package = ("sparsessm", *file.relative_to(SOURCE).parts[:-1])
            places = dict(
                zip((a.asname or a.name for a in node.names), rooms.imports(node, package), strict=True)
            )
            return defined(places[own]) if places[own] != name else None
    return None


def names_used(file: Path) -> set[str]:
    """Full dotted names of what a file imports, and of what it takes from a module that it imports."""
    package = ("sparsessm", *file.relative_to(SOURCE).parts[:-1]) if SOURCE in file.parents else ()
    known: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ImportFrom):
            for alias, full in zip(node.names, rooms.imports(node, package), strict=True):
                known[alias.asname or alias.name].add(full)
    parts = {
        f"{full}.{node.attr}"
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        for full in known[node.value.id]
    }
    return parts.union(*known.values())


def test_names_used_in_another_room_say_what_they_are() -> None:
    bare, count = set(), 0
    for file in TREES:
        for name in names_used(file):
            found = defined(name)
            if found and rooms.room(found[0]) != rooms.room(file):
                count += 1
                if not ast.get_docstring(found[1]):  # pyright: ignore[reportArgumentType]
                    bare.add(f"{place(found[0])}: {name.rpartition('.')[2]}")
    assert bare <= UNDOCUMENTED_TO_DO and count > 200
    for name in sparsessm.__all__:
        assert getattr(sparsessm, name).__doc__, name


def test_names_are_followed_to_where_they_are_defined() -> None:
    handed_on = defined("sparsessm.checkpoint.load")
    assert handed_on and handed_on == defined("sparsessm.checkpoint.reading.load")
    assert defined("sparsessm.checkpoint.no_such_name") is None
    found = defined("sparsessm.kernels.reference.selective_scan")
    assert found and not ast.get_docstring(found[1])  # pyright: ignore[reportArgumentType]
