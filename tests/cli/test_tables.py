"""What a person sees in the end: tables, on a narrow terminal too."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from sparsessm.cli import tables

Capture = pytest.CaptureFixture[str]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


NAMES = ["backbone.layers.0.mixer.A_log", "backbone.layers.11.mixer.in_proj.weight"]
CELLS = [[name, str(10**12 + number), "50.00 %"] for number, name in enumerate(NAMES)]


def shown(capsys: Capture) -> list[str]:
    tables.show(
        tables.table("What was removed", ["target", "removed", "share"], CELLS), "A closing sentence."
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    return ESCAPE.sub("", captured.out).splitlines()


def columns_of(lines: list[str]) -> list[str]:
    """The text of each column, folded lines of a cell joined."""
    rows = [line.strip("│┃").split("│") for line in lines if line.startswith("│")]
    return ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]


def test_a_table_in_forty_columns_folds_and_loses_nothing(
    terminal: Callable[[int], None], capsys: Capture
) -> None:
    terminal(40)
    lines = shown(capsys)
    assert max(map(len, lines)) <= 40
    expected = ["".join(column).replace(" ", "") for column in zip(*CELLS, strict=True)]
    assert [text.replace(" ", "") for text in columns_of(lines)] == expected
    assert "…" not in "".join(lines)
    assert lines[0] == "What was removed"
    assert lines[-1] == "A closing sentence."


def test_a_table_in_a_file_is_wide(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = shown(capsys)
    for line in CELLS:
        assert any(all(cell in text for cell in line) for text in lines)
    assert max(map(len, lines)) <= tables.FILE_WIDTH


def test_words_are_left_and_numbers_right_and_nothing_is_markup(capsys: Capture) -> None:
    tables.show(tables.table("T", ["name", "number"], [["[red]a", "1"], ["longer name", "1000"]]))
    row = next(line for line in capsys.readouterr().out.splitlines() if "[red]a" in line)
    assert re.fullmatch(r"│ \[red\]a +│ +1 │", row)
