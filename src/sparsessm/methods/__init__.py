"""Stage 2, HOW MUCH each element matters: METHODS, the table. One file a paper, one row a method."""

from __future__ import annotations

from collections.abc import Mapping

from sparsessm.methods import exact, magnitude, sparsessm
from sparsessm.methods.base import Method, Rule

METHODS: Mapping[str, Method] = {
    row.name: row
    for row in (magnitude.random, magnitude.magnitude, sparsessm.vote, sparsessm.weighted, exact.exact)
}

__all__ = ["METHODS", "Method", "Rule"]
