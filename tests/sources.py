"""All code of the project as trees, for tests of what it may say. Rooms and imports: tools/rooms.py."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import rooms  # noqa: E402

SOURCE = rooms.SOURCE
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in rooms.files()}
OURS = {file: tree for file, tree in TREES.items() if SOURCE in file.parents}
TESTS = {file: ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "tests").rglob("*.py")}


def place(file: Path) -> str:
    """Where a file lies in the package."""
    return file.relative_to(SOURCE).as_posix()


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def code(text: str) -> ast.Module:
    """Made-up code, to show that a law can be broken."""
    return ast.parse(dedent(text))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
