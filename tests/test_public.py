"""docs/api.md lists what is public, and the code has it with these arguments."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import sparsessm
from sparsessm.checkpoint import Checkpoint
from sparsessm.evaluation.perplexity import Perplexity
from sparsessm.report.record import Report
from sparsessm.runtime.generation import Model

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text(encoding="utf-8")
FUNCTIONS = dict(re.findall(r"^\| `sparsessm\.([\w.]+)\((.*?)\)` \|", PAGE, flags=re.MULTILINE))


def test_the_page_lists_what_the_door_gives_and_nothing_else() -> None:
    public = {name for name in sparsessm.__all__ if name != "runtime"}
    public |= {f"runtime.{name}" for name in sparsessm.runtime.__all__}
    assert FUNCTIONS.keys() == public


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_those_of_the_page(name: str) -> None:
    function = sparsessm
    for part in name.split("."):
        function = getattr(function, part)
    assert callable(function) and inspect.getdoc(function)
    parameters = [
        part.replace(annotation=part.empty) for part in inspect.signature(function).parameters.values()
    ]
    assert str(inspect.Signature(parameters)).replace("'", '"') == f"({FUNCTIONS[name]})"


@pytest.mark.parametrize("kind", [Checkpoint, Report, Perplexity, Model])
def test_what_is_public_of_an_object_exists(kind: type) -> None:
    (row,) = re.findall(rf"^\| `{kind.__name__}` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    names = re.findall(r"`(\w+)(?:\(\))?`", row)
    assert names or kind is Perplexity
    fields = getattr(kind, "__dataclass_fields__", {})
    assert all(name in fields or hasattr(kind, name) for name in names)
