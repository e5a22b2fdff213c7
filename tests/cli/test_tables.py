"""What a person sees: bars on a terminal, lines elsewhere, nothing if quiet; tables on a narrow terminal."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from sparsessm.cli import tables

Capture = pytest.CaptureFixture[str]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that progress lines see."""
    now = [0.0]
    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = seconds

    return set_to


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the output a terminal of so many columns."""

    def of(columns: int) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(columns))

    return of


def test_on_a_terminal_progress_is_bars_with_time_left(
    terminal: Callable[[int], None], capsys: Capture
) -> None:
    terminal(100)
    with tables.Progress() as progress:
        progress.note("a note")
        progress.say("reading")
        progress.say("dense model")
        for done in range(5):
            progress("calibrate", done, 4)
        progress("calibrate", 1, 4)  # the same stage from its start
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.split("reading")[-1]
    assert "1/1" in last.split("dense model")[0]  # a step that reports nothing is full when the next begins
    assert "1/4" in last.split("dense model")[1]
    assert "left" in last
    assert captured.err.count("a note") == 1


def test_a_bar_that_nobody_announced_has_the_name_of_its_stage(
    terminal: Callable[[int], None], capsys: Capture
) -> None:
    terminal(100)
    with tables.Progress() as progress:
        progress("calibrate", 3, 4)
    assert "calibrate" in (text := ESCAPE.sub("", capsys.readouterr().err))
    assert "3/4" in text


def test_a_step_that_fails_is_not_shown_as_done(terminal: Callable[[int], None], capsys: Capture) -> None:
    terminal(100)
    with pytest.raises(ValueError, match="no such text"), tables.Progress() as progress:
        progress.say("reading")
        raise ValueError("no such text")
    text = capsys.readouterr().err
    assert "1/1" not in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_elsewhere_progress_is_a_line_now_and_then(clock: Callable[[float], None], capsys: Capture) -> None:
    with tables.Progress() as progress:
        progress.say("dense model")
        for done in range(101):
            clock(0.5 * done)
            progress("evaluate", done, 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "dense model",
        "evaluate: 20 of 100, 40 s left",
        "evaluate: 40 of 100, 30 s left",
        "evaluate: 60 of 100, 20 s left",
        "evaluate: 80 of 100, 10 s left",
        "evaluate: 100 of 100, 50 s",
    ]


@pytest.mark.parametrize("announced", [True, False])
def test_a_stage_that_starts_anew_has_a_new_clock(
    announced: bool, clock: Callable[[float], None], capsys: Capture
) -> None:
    """Two models are measured one after the other; one budget over all layers calibrates twice."""
    with tables.Progress() as progress:
        for start in (0.0, 1000.0):
            if announced:
                progress.say("a model")
            for done in range(3):
                clock(start + 20 * done)
                progress("evaluate", done, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "a model"]
    assert lines == ["evaluate: 1 of 2, 20 s left", "evaluate: 2 of 2, 40 s"] * 2


@pytest.mark.parametrize("columns", [None, 80])
def test_quiet_is_silent(columns: int | None, terminal: Callable[[int], None], capsys: Capture) -> None:
    if columns:
        terminal(columns)
    with tables.Progress(quiet=True) as progress:
        progress.note("a note")
        progress.say("reading")
        progress("evaluate", 2, 2)
    assert capsys.readouterr() == ("", "")


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
