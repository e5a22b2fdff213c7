"""Writes the tables of what is supported and what it was tried on, from the code and from tables of tests.

python tools/support_table.py

They stand between two comments each in README.md, docs/architectures.md and the pages of docs/families/.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from sparsessm.architectures import MODEL_TYPES
from sparsessm.checkpoint import exporting, wrapped
from sparsessm.methods.patterns import AXES
from sparsessm.runtime.base import FIELDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DELTA = "delta.md"  # the page of the types that have none of their own


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def about(kind: str) -> str:
    """What a model type is, as its adapter says it."""
    return str(MODEL_TYPES[kind].__doc__).splitlines()[0].partition(" (`")[0].rstrip(".")


def units(kind: str) -> list[str]:
    """The units that can be removed whole."""
    return [axis for axis in AXES if axis in MODEL_TYPES[kind].structure]


def page(kind: str) -> str:
    """The page about a model type, in docs/."""
    own = f"families/{kind}.md"
    return own if (DOCS / own).exists() else DELTA


def published(kind: str) -> list[str]:
    """The published models whose `config.json` the tests have, and other published forms of a type."""
    forms: ModuleType = _tests("published")
    found = [f"`{name}`" for name, fields in forms.PUBLISHED.items() if fields["model_type"] == kind]
    found += [f"inside `{whole}`" for whole, inner in forms.WRAPPED.items() if inner == kind]
    return found + ["older fields"] * (kind in forms.OLDER)


def trained(kind: str) -> list[str]:
    """The built-in models of a type."""
    configs = sorted((ROOT / "src/sparsessm/builtin").glob("*/config.json"))
    return [f"`builtin:{c.parent.name}`" for c in configs if json.loads(c.read_text())["model_type"] == kind]


def _tests(name: str) -> ModuleType:
    """A module of tests/, which lies beside this folder."""
    if (folder := str(ROOT / "tests")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def table() -> str:
    """Markdown, a row for each model type: what can be removed, and what runs."""
    rows = [
        [
            *(f"`{kind}`", about(kind), "yes"),
            *("yes" if axis in units(kind) else "" for axis in AXES),
            "yes" if kind in FIELDS else "",
        ]
        for kind in MODEL_TYPES
    ]
    return _rows(["model_type", "what it is", "unstructured, N:M", *AXES, "runtime"], rows)


def short() -> str:
    """The same for a reader who wants to know whether a model will do, with what it was tried on."""
    wholes = {inner: whole for whole, inner in wrapped.WRAPPERS.items()}
    rows = []
    for kind in MODEL_TYPES:
        name = f"[`{kind}`](docs/{page(kind)})" + (f", `{wholes[kind]}`" if kind in wholes else "")
        marks = ["yes" if kind in which else "" for which in (FIELDS, exporting.NAMES)]
        forms = str(len(published(kind)) or "")
        rows.append([name, ", ".join(units(kind)), *marks, forms, ", ".join(trained(kind))])
    return _rows(["model type", "whole units", "runtime", "GGUF", "published forms", "trained"], rows)


def tried(kind: str) -> str:
    """What is supported of one type and what it was tried on, for its page."""
    rows = [
        ["`model_type`", f"`{kind}`"],
        ["whole units", ", ".join(units(kind))],
        ["our runtime", "yes" if kind in FIELDS else "no"],
        ["GGUF", "yes" if kind in exporting.NAMES else "no"],
        ["published `config.json`", ", ".join(published(kind)) or "none"],
        ["trained model", ", ".join(trained(kind)) or "none: small random models only"],
    ]
    return _rows(["", ""], rows)


def put(text: str, name: str, table: str) -> str:
    """A page with a table between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
        ValueError: the two comments do not stand there once each.
    """
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, between, after = text.partition(first)
    _, end, after = after.partition(last)
    if not between or not end or re.search(f"{first}|{last}", after):
        raise ValueError(f"{first} and {last} must stand on the page once each")
    return f"{before}{first}\n{table}\n{last}{after}"


def pages() -> Iterator[tuple[Path, str]]:
    """(page, its text as it should be) of each page with such a table."""
    wanted = {ROOT / "README.md": ("supported", short()), DOCS / "architectures.md": ("supported", table())}
    for kind in MODEL_TYPES:
        if page(kind) != DELTA:
            wanted[DOCS / page(kind)] = ("tried", tried(kind))
    for file, (name, made) in wanted.items():
        yield file, put(file.read_text(encoding="utf-8"), name, made)


if __name__ == "__main__":
    for file, text in pages():
        file.write_text(text, encoding="utf-8")
