"""`sparsessm fit --tasks`: a limit on the accuracy of tasks, on small tasks of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import FAST, refused, row_of, run
from questions import CHOICE, ROLLING, noise, write_task

from sparsessm.cli.fitting import NOTHING

pytestmark = pytest.mark.usefixtures("here")


def quiz(fields: dict[str, object], documents: int) -> list[str]:
    Path("quiz").mkdir()
    write_task(Path("quiz").resolve(), "choice", fields, noise(documents))
    return ["fit", "dense", *FAST, "-o", "out", "--tasks", "choice", "--include-path", "quiz"]


def test_a_limit_on_accuracy_is_kept_by_the_upper_end() -> None:
    line = quiz(CHOICE, 60)
    printed = run(*line, "--max-drop", "20%").stdout
    found = json.loads(Path("out/fit.json").read_text())
    tasks = found["chosen"]["tasks"]
    assert tasks["drop"] <= tasks["high"] <= 0.2 and tasks["documents"] == {"choice": 60}
    fall = tasks["dense"]["choice"] - tasks["pruned"]["choice"]
    assert tasks["drop"] == pytest.approx(fall, abs=1e-9)
    assert found["asked"]["tasks"] == ["choice"] and found["verified"]["high"] is not None
    assert "accuracy (95 %)" in printed
    assert row_of(printed, f"{found['chosen']['bits']:g}")[-1] == "chosen"


def test_few_documents_say_too_little() -> None:
    """The interval of three documents is wider than the limit, even where no answer changes."""
    line = quiz(CHOICE, 3)
    done = run(*line, "--max-drop", "0.01%", "--max-size", "16KB", "--json", code=NOTHING)
    document = json.loads(done.stdout)
    assert document["points"] and all(point["tasks"]["high"] > 0.0001 for point in document["points"])


def test_tasks_without_an_accuracy_and_idle_options_are_refused() -> None:
    line = quiz(ROLLING, 4)
    assert "task 'choice' has no accuracy for max-drop" in refused(*line, "--max-drop", "1%")
    idle = refused("fit", "dense", *FAST, "-o", "out", "--max-size", "17KB", "--include-path", "quiz")
    assert "--include-path has no effect without --tasks" in idle
    assert not Path("out").exists() and not Path("out.unfinished").exists()
