"""Stage 2, HOW MUCH each element matters: METHODS, the table. One file a paper, one row a method."""

from __future__ import annotations

from collections.abc import Mapping

from sparsessm.methods import exact, magnitude, sparsegpt, sparsessm, wanda
from sparsessm.methods.base import Method, Rule

METHODS: Mapping[str, Method] = {
    row.name: row
    for row in (
        magnitude.random,
        magnitude.magnitude,
        wanda.wanda,
        sparsegpt.sparsegpt,
        sparsegpt.absorb,
        sparsessm.vote,
        sparsessm.weighted,
        exact.exact,
    )
}
# Of each target family, the method that won our measurements (docs/methods.md).
DEFAULTS: Mapping[str, str] = {"ssm": "exact", "projections": "absorb", "conv1d": "absorb", "head": "absorb"}


__all__ = ["DEFAULTS", "METHODS", "Method", "Rule"]
