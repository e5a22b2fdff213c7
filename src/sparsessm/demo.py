"""The demo: the built-in model pruned in several ways, compared on held-out text; for `sparsessm demo`.

Place in the flow: on top of the door, as a user's program would be; `cli` prints what comes from here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sparsessm

from .checkpoint import Checkpoint
from .evaluation import Perplexity
from .pipeline import needs_data
from .report import Report
from .tables import Progress
from .yardstick import Yardstick, compared

MODEL = "builtin:pycode"
TOKENS = 65536  # held-out tokens that every result is measured on
_EXACT = {
    "targets": ["ssm"]
}  # the state matrix in all rows by its default, so that the linear layers compare
RUNS: dict[str, dict[str, Any]] = {
    "A_log alone: sparsessm": {"target": "ssm", "method": "sparsessm"},
    "A_log alone: exact": {"target": "ssm"},
    "all: magnitude": {"rules": [{"targets": ["projections"], "method": "magnitude"}, _EXACT]},
    "all: wanda": {"method": "wanda"},
    "all: sparsegpt": {"method": "sparsegpt"},
    "all: absorb (the default)": {},
}
SAVED = "all: absorb (the default)"  # the run whose model is kept


class Demo(NamedTuple):
    """What was compared.

    Attributes:
        dense: the model before. measured: run -> as `Report.perplexity`.
        checkpoint, report: of the run `SAVED`; the report tells of all.
    """

    dense: Perplexity
    measured: dict[str, dict[str, Any]]
    checkpoint: Checkpoint
    report: Report


def compare(progress: Progress, **fields: Any) -> Demo:
    """Prune and measure by every one of `RUNS`.

    Args:
        fields: of the recipe, the same for all runs.

    Raises:
        ValueError: as `sparsessm.prune`.
    """
    checkpoint = sparsessm.load(MODEL)
    recipes = {name: sparsessm.resolve(checkpoint, **run, **fields) for name, run in RUNS.items()}
    progress.say("reading the standard library")
    hungry = [name for name in recipes if needs_data(sparsessm.planned(checkpoint, recipes[name]))]
    first = next(iter(recipes.values()))
    tokens = sparsessm.draw(checkpoint, recipes[hungry[0]]) if hungry else None  # the same for all
    yardstick = Yardstick.of(checkpoint, first, TOKENS)
    progress.say("dense model")
    dense = yardstick.measure(checkpoint, progress)
    measured: dict[str, dict[str, Any]] = {}
    kept = None
    for name, recipe in recipes.items():
        checkpoint = sparsessm.load(MODEL)
        progress.say(f"pruning, {name}")
        report = sparsessm.follow(checkpoint, recipe, tokens if name in hungry else None, progress)
        progress.say(f"measuring, {name}")
        measured[name] = compared(dense, yardstick.measure(checkpoint, progress))
        kept = (checkpoint, report) if name == SAVED else kept
    assert kept is not None, "SAVED is none of RUNS"
    checkpoint, report = kept
    methods = {name: {part: measured[name][part] for part in ("pruned", "difference")} for name in measured}
    report.perplexity = {**measured[SAVED], "methods": methods}
    return Demo(dense, measured, checkpoint, report)
