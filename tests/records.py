"""A report with made-up rows and figures, for tests of tables, records and cards."""

from __future__ import annotations

from typing import Any

from sparsessm.report.record import (
    Report,
    Row,
)

MEASURED = {"data": "stdlib", "windows": 4, "length": 8, "bits_per_byte": 1.5, "nll": 2.0}
DENSE = {**MEASURED, "perplexity": 10.0, "low": 9.0, "high": 11.0}
PRUNED = {**MEASURED, "perplexity": 10.5, "low": 9.5, "high": 11.5}


def row(layer: int = 0, **fields: Any) -> Row:
    name = f"backbone.layers.{layer}.mixer.A_log"
    facts: dict[str, Any] = {"family": "ssm", "method": "exact", "pattern": "2:4", "removed": "memoryless"}
    return Row(**{"target": name, "layer": layer, "total": 100, "pruned": 40, **facts, **fields})


def matrix(kind: str, layer: int = 0, **fields: Any) -> Row:
    facts = {"family": "projections", "method": "absorb", "pattern": "unstructured", "removed": "zero"}
    return row(layer, **{"target": f"backbone.layers.{layer}.mixer.{kind}.weight", **facts, **fields})


def report(*rows: Row, **fields: Any) -> Report:
    recipe = {"model": "m", "method": "exact", "sparsity": 0.4, "tokenizer": None}
    return Report(
        **{"recipe": recipe, "rows": list(rows), "fingerprint": "ab" * 32, "seconds": 1.23456, **fields}
    )
