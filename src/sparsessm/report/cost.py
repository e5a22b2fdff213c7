"""What a run will take, as a table: the values of `pruning/forecast.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .contents import Table


def cost_table(record: Mapping[str, Any]) -> Table:
    """A forecast as plain values, for people."""
    parts = {
        "prices": "prices of errors (one backward pass)",
        "survey": "who can spare how much",
        "blocks": "the blocks",
        "perplexity": "perplexity before and after",
    }
    cells = [[title, time_in_words(record["seconds"][name])] for name, title in parts.items()]
    cells.append(["in all, about", time_in_words(sum(record["seconds"].values()))])
    cells.append(["memory, about", f"{record['memory'] / 1e9:.1f} GB"])
    cells.append(["disk beside the result, about", f"{record['disk'] / 1e9:.1f} GB"])
    return "What the run takes on this machine", ["", ""], cells, 1


def time_in_words(seconds: float) -> str:
    """For people: rounded."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
