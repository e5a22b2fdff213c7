"""The record by layer and matrix: what its pictures and tables show.

Place in the flow: between the record's rows and `pictures.py`. Experts of a layer count as one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..record import kind_of
from .words import number_at, rows_at


@dataclass(frozen=True)
class Cell:
    """One kind of matrix in one layer.

    Attributes:
        layer: its index, of embedding and head the number of layers. kind: of the matrix, as "A_log".
        place: the layer as a reader knows it: "0", and "end" for embedding and head.
        sparsity: share of its entries removed. bits: stored a weight, None unless on a grid.
        error: energy of the output error over that of the output, mean over experts; None if unknown.
    """

    layer: int
    kind: str
    place: str
    sparsity: float | None
    bits: float | None
    error: float | None


def cells(record: Mapping[str, Any]) -> list[Cell]:
    """Of all rows of a record that say where they belong, by layer in the order of the model."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows_at(record, "targets"):
        layer, name = row.get("layer"), row.get("target")
        if isinstance(layer, int) and isinstance(name, str) and name:
            groups.setdefault((layer, kind_of(name)), []).append(row)
    found = [_cell(layer, kind, rows) for (layer, kind), rows in groups.items()]
    return sorted(found, key=lambda cell: cell.layer)


def _cell(layer: int, kind: str, rows: list[Mapping[str, Any]]) -> Cell:
    total = _sum(rows, "total")
    gone = _sum(rows, "pruned")
    errors = []
    for row in rows:
        error, signal = number_at(row, "error"), number_at(row, "signal")
        if error is not None and signal:
            errors.append(error / signal)
    bits = None if any(number_at(row, "bits") is None for row in rows) else _sum(rows, "bits")
    return Cell(
        layer,
        kind,
        "end" if any(row.get("family") in ("head", "embedding") for row in rows) else str(layer),
        _within(gone / total, 1.0) if total else None,
        _within(bits / total, 128.0) if bits is not None and total else None,
        _within(sum(errors) / len(errors), 1e12) if errors else None,
    )


def _within(value: float, most: float) -> float | None:
    """The value, None where no such thing can be that large or below 0."""
    return value if 0 <= value <= most else None


def _sum(rows: list[Mapping[str, Any]], name: str) -> float:
    return sum(number_at(row, name) or 0.0 for row in rows)


def whole_units(record: Mapping[str, Any]) -> bool:
    """Whether its rows count units and not entries."""
    rows = rows_at(record, "targets")
    return bool(rows) and all(row.get("removed") in ("cut", "projected") for row in rows)


def kinds(found: list[Cell]) -> list[str]:
    """In the order of the model."""
    return list(dict.fromkeys(cell.kind for cell in found))
