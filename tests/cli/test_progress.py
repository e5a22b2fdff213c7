"""What is told while a command works: bars on a terminal, lines elsewhere, events for programs, nothing if
quiet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from sparsessm.cli import progress as told
from sparsessm.cli.progress import to_stderr

Capture = pytest.CaptureFixture[str]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that progress lines see."""
    now = [0.0]
    monkeypatch.setattr(told.time, "monotonic", lambda: now[0])

    def set_to(seconds: float) -> None:
        now[0] = seconds

    return set_to


def test_on_a_terminal_progress_is_bars_with_time_left(
    terminal: Callable[[int], None], capsys: Capture
) -> None:
    terminal(100)
    with to_stderr() as progress:
        progress.note("a note")
        progress.say("reading")
        progress.say("dense model")
        for done in range(5):
            progress("calibrate", done, 4, "")
        progress("calibrate", 1, 4, "")  # the same stage from its start
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
    with to_stderr() as progress:
        progress("calibrate", 3, 4, "")
    assert "calibrate" in (text := ESCAPE.sub("", capsys.readouterr().err))
    assert "3/4" in text


def test_a_step_that_fails_is_not_shown_as_done(terminal: Callable[[int], None], capsys: Capture) -> None:
    terminal(100)
    with pytest.raises(ValueError, match="no such text"), to_stderr() as progress:
        progress.say("reading")
        raise ValueError("no such text")
    text = capsys.readouterr().err
    assert "1/1" not in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_elsewhere_progress_is_a_line_now_and_then(clock: Callable[[float], None], capsys: Capture) -> None:
    with to_stderr() as progress:
        progress.say("dense model")
        for done in range(101):
            clock(0.5 * done)
            progress("evaluate", done, 100, "")
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
    with to_stderr() as progress:
        for start in (0.0, 1000.0):
            if announced:
                progress.say("a model")
            for done in range(3):
                clock(start + 20 * done)
                progress("evaluate", done, 2, "")
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "a model"]
    assert lines == ["evaluate: 1 of 2, 20 s left", "evaluate: 2 of 2, 40 s"] * 2


@pytest.mark.parametrize("columns", [None, 80])
def test_quiet_is_silent(columns: int | None, terminal: Callable[[int], None], capsys: Capture) -> None:
    if columns:
        terminal(columns)
    with to_stderr(quiet=True) as progress:
        progress.note("a note")
        progress.say("reading")
        progress("evaluate", 2, 2, "")
    assert capsys.readouterr() == ("", "")


def test_bars_and_lines_say_the_block(
    terminal: Callable[[int], None], clock: Callable[[float], None], capsys: Capture
) -> None:
    with to_stderr() as progress:
        progress("fisher", 0, 8, "block 1 of 24")
        clock(20.0)
        progress("fisher", 0, 8, "block 3 of 24")  # no step is done yet: how long it takes is not known
        clock(40.0)
        progress("fisher", 2, 8, "block 3 of 24")
        progress("fisher", 8, 8, "head")
    assert capsys.readouterr().err.splitlines() == [
        "fisher: 0 of 8, block 3 of 24",
        "fisher: 2 of 8, block 3 of 24, 120 s left",
        "fisher: 8 of 8, 40 s",
    ]
    terminal(120)
    with to_stderr() as progress:
        progress("fisher", 2, 8, "block 3 of 24")
    assert "2/8 block 3 of 24" in ESCAPE.sub("", capsys.readouterr().err)


def test_events_are_json_lines_at_most_one_a_second(clock: Callable[[float], None], capsys: Capture) -> None:
    with to_stderr(events=True) as progress:
        progress.note("an\x1b note\n")
        progress.say("dense model")
        for done in range(21):
            clock(0.25 * done)
            progress("evaluate", done, 20, f"block {done} of 20" if done else "")
    captured = capsys.readouterr()
    assert captured.out == ""
    note, step, *steps = [json.loads(line) for line in captured.err.splitlines()]
    assert note == {"event": "note", "text": "an\x1b note\n"}
    assert step == {"event": "step", "text": "dense model"}
    assert [each["done"] for each in steps] == [4, 8, 12, 16, 20]
    assert all(each.pop("memory") > 2**20 for each in steps)
    assert steps[0] == {
        "event": "progress",
        "stage": "evaluate",
        "done": 4,
        "total": 20,
        "block": "block 4 of 20",
        "seconds": 1.0,
        "left": 4.0,
    }
    assert progress.doing == "dense model"
    assert progress.restored() == b""
