"""How many calibration tokens reached the experts of a model, as a table.

Place in the flow: beside the record; `analyze` and `inspect` show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsessm.report.contents import Table

LISTED = 8  # experts of a layer that are told by number


def fed(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tensor of experts -> the "tokens" that each of them saw, in their order, and "inputs" of its matrix.

    Args:
        rows: of a record, `targets`; those that are no expert's say nothing. Older ones have no inputs.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("tokens") is not None and row.get("inputs") is not None:
            facts = found.setdefault(
                row["target"].rpartition(".")[0], {"tokens": [], "inputs": row["inputs"]}
            )
            facts["tokens"].append(row["tokens"])
    return found


def fed_table(experts: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `fed` returned, for people: experts that saw fewer tokens than they have inputs are named."""
    cells = []
    for name, facts in experts.items():
        tokens, inputs = facts["tokens"], facts["inputs"]
        few = [f"{e} ({count})" for e, count in enumerate(tokens) if count < inputs]
        told = ", ".join(few[:LISTED]) + (" ..." if len(few) > LISTED else "")
        sizes = (min(tokens), sorted(tokens)[len(tokens) // 2], max(tokens), inputs)
        cells.append([name, told or "none", *(f"{size:,}" for size in sizes)])
    columns = ["matrices", "experts with fewer tokens than inputs", "fewest", "middle", "most", "inputs"]
    return "Calibration tokens of experts", columns, cells, 2
