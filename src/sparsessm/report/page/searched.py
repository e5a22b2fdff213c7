"""What `sparsessm fit` found, as the page shows it: the one place that reads the content of fit.json for it.

Place in the flow: between fit.json (docs/fit.md) and the argument `fit` of `page`. A file may hold anything:
what is not what it should be is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .words import at, figure, number_at, percent, plainly, rows_at, size

INTERVAL = "the upper end of its 95 % interval"


def searched(finding: Mapping[str, Any]) -> dict[str, Any]:
    """The argument `fit` of `page`, of the content of fit.json."""
    chosen = number_at(finding, "chosen", "bits")
    points = sorted(rows_at(finding, "points"), key=lambda point: number_at(point, "bits") or 0.0)
    rows = []
    for point in points:
        mine = chosen is not None and point.get("bits") == chosen
        note = "" if mine else "refused" if point.get("why") else "keeps to the limits"
        names = ("bits", "bytes", "increase", "low", "high")
        rows.append({**{name: point.get(name) for name in names}, "note": note})
    refused = [
        f"{figure(row.get('bits'), 'g')} bits: {_sentences(row.get('why'), '; ')}"
        for row in sorted(rows_at(finding, "refused"), key=lambda row: number_at(row, "bits") or 0.0)
    ]
    return {
        "asked": _asked(finding),
        "points": rows,
        "chosen": chosen,
        "refused": refused,
        "why": _sentences(finding.get("why"), " "),
        "held_out": [at(finding, "text", part, "sha256") for part in ("search", "verification")],
    }


def _asked(finding: Mapping[str, Any]) -> str:
    """The limits as one sentence; "" where none is known."""
    increase, drop, most, least = (
        number_at(finding, "asked", name) for name in ("max-increase", "max-drop", "max-size", "min-speed")
    )
    limits = []
    if increase is not None:
        limits.append(f"perplexity rises by at most {percent(increase, '.3g')} ({INTERVAL})")
    if drop is not None:
        tasks = plainly(at(finding, "asked", "tasks")) or "the tasks"
        number = figure(100 * drop, ".3g")
        points = f"{number} percentage point{'s' * (number != '1')}"
        limits.append(f"the mean accuracy of {tasks} falls by at most {points} ({INTERVAL})")
    if most is not None:
        limits.append(f"the file takes at most {size(most)}")
    if least is not None:
        limits.append(f"our runtime decodes at least {figure(least, ',.6g')} tokens a second")
    if not limits:
        return ""
    model = finding.get("model")
    of = f" of {model}" if isinstance(model, str) and model else ""
    which = "largest" if increase is None and drop is None else "smallest"
    together = "; and ".join(filter(None, ["; ".join(limits[:-1]), limits[-1]]))
    return f"Find the {which} size{of} at which {together}."


def _sentences(value: Any, between: str) -> str:
    return between.join(map(plainly, value)) if isinstance(value, list | tuple) else plainly(value)
