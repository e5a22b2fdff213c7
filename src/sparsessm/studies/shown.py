"""The page about what a search found: measured where the search did not, and written beside the finding.

Place in the flow: the end of `trials.py`, while the result is not in its place yet. What measures is
`evaluation/beside_dense.py`, and `report/page` makes the page, as for the command `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsessm.calibration.progress import Progress
from sparsessm.checkpoint import open_checkpoint
from sparsessm.checkpoint.companions import PAGE
from sparsessm.evaluation import beside_dense
from sparsessm.evaluation.beside_dense import Known
from sparsessm.report.page.document import page
from sparsessm.report.page.searched import searched
from sparsessm.report.record import checked, finite, percent

from .limits import Point


def write_page(
    folder: Path,
    finding: Mapping[str, Any],
    known: Known,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write report.html and measured.json into a result.

    What cannot be measured is left out, and the page says so.

    Args:
        folder: with all files of the result. finding: the content of fit.json.
        progress, say: as of `beside_dense.measure`.

    Raises:
        ValueError: matplotlib is not installed. OSError: as the file system reports it.
    """
    opened = open_checkpoint(str(folder))
    record = checked(opened.record, str(folder)) or {}
    tasks = finding["asked"]["tasks"]
    question = beside_dense.asked(record, None, against=None, data=None, tasks=tasks)
    found = beside_dense.measure(opened, record, question, known=known, progress=progress, say=say)
    beside_dense.keep(folder, found)
    text = page(record, found, directory=known.name, fit=searched(finding))
    (folder / PAGE).write_text(text, encoding="utf-8")


def task_table(point: Point) -> dict[str, Any]:
    """`Measured.tasks` of a point; empty where no tasks were asked for."""
    if not (told := point.tasks):
        return {}
    cells = [
        [
            task,
            metric,
            f"{told['documents'][task]:,}",
            f"{100 * told['dense'][task]:.2f}",
            f"{100 * told['pruned'][task]:.2f}",
        ]
        for task, metric in told["metrics"].items()
    ]
    ends = f"{percent(-told['high'], '+')} to {percent(-told['low'], '+')}"
    note = f"The mean accuracy changes by {percent(-told['drop'], '+')}, in percentage points; 95 %: {ends}."
    return finite(
        {
            "title": "Accuracy in %",
            "columns": ["task", "metric", "documents", "dense", "compressed"],
            "cells": cells,
            "words": 2,
            "notes": [note],
        }
    )
