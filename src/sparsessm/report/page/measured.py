"""What was measured of a result beside its dense model, as plain values: `measured.json`.

Place in the flow: `evaluation/beside_dense.py` measures and keeps it, the page shows it beside the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """Plain values only; what was not measured is empty, and `missing` says why.

    Attributes:
        weights: SHA-256 of the files that were measured; "" if nothing was.
        against: the dense model, as the user would name it; "" if there was none.
        day: of the measurement, as 2026-01-31.
        asked: what it depends on: "data", "tasks" and "against".
        perplexity: "dense", "pruned" (`Perplexity.record`) and "difference" ("mean", "low", "high").
        divergence: KL(dense || result) of the next token, nats: "mean", "low", "high" (95 % over windows),
            "median", "p99", "most"; "same": share of tokens whose likeliest is the same; "tokens";
            "edges" (the lower ones) and "counts", B each, of a histogram over tokens.
        windows: those that suffered most, the worst first: "index", "lost", "before", "after" (nats a token),
            "start", "tokens" ([text, nats lost] of a stretch) and "worst" ([text, before, after]).
        sizes: "result" and "dense": "weights" and "all", bytes on the disk.
        speed: what `evaluation.speed.Measurement.record` returns, the result first.
        tasks: "columns", "cells", "words" and "notes" of a table; "title".
        machine: as in a record, with "versions".
        missing: sentences.
    """

    weights: str = ""
    against: str = ""
    day: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    perplexity: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] = field(default_factory=dict)
    windows: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The content of measured.json."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def restored(cls, content: Mapping[str, Any]) -> Measured | None:
        """Of a file's content; None of another format, or where a field is not what it should be."""
        empty = cls()
        names = [one.name for one in fields(cls)]
        if content.get("format") != FORMAT or {*content} != {"format", *names}:
            return None
        if any(type(content[name]) is not type(getattr(empty, name)) for name in names):
            return None
        return cls(**{name: content[name] for name in names})
