"""docs/design.md shows the code as it is: the loop, the floors, the files that it names."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest

from sparsessm.pruning import entries

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/design.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tools"))
rooms = importlib.import_module("rooms")


def body(source: str) -> str:
    """A function without its signature and docstring."""
    lines = textwrap.dedent(source).splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(r"\) ?->|def .*:$", line)) + 1
    text = textwrap.dedent("\n".join(lines[start:]))
    return re.sub(r'\A"""[\s\S]*?"""\n', "", text)


@pytest.mark.parametrize("part", [entries.EntryPlan._carry_out, entries.solve])
def test_the_page_shows_the_loop_as_the_code_has_it(part: object) -> None:
    assert f"```python\n{body(inspect.getsource(part))}\n```" in PAGE  # type: ignore[arg-type]


def test_the_page_shows_the_floors() -> None:
    for floor, names in rooms.FLOORS.items():
        line = next((line for line in PAGE.splitlines() if line.startswith(f"    {floor}  ")), "")
        shown = set(line.split()[1:])
        assert shown == {name.replace("__init__", "the_door") for name in names}, floor


def test_the_files_that_the_page_names_exist() -> None:
    names = set(re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]*(?:\.py|\.h)?)`", PAGE))
    assert len(names) > 30
    for name in names:
        assert any((ROOT / top / name).exists() for top in (".", "src/sparsessm")), name
