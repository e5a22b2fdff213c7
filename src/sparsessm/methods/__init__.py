"""Stage 2, HOW MUCH each element matters: METHODS, the table. One file a paper, one row a method.

A row has two sides: what a method does with the entries of a matrix, and what it does with whole units of a
model. Many have one of them. A new method is a row; nothing else names it. Who is pruned how much is a table
of its own, `allocation.ALLOCATIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsessm.methods import exact, magnitude, sparsegpt, sparsessm, structured, wanda
from sparsessm.methods.base import EntryMethod, Rule
from sparsessm.methods.structured import UnitMethod


@dataclass(frozen=True)
class Method:
    """A row of METHODS: a name that users type, and what it stands for.

    Attributes:
        entries: how single entries are scored; None: it chooses whole units only.
        units: how whole units are chosen; None: it scores single entries only.
    """

    entries: EntryMethod | None = None
    units: UnitMethod | None = None

    def __post_init__(self) -> None:
        names = {side.name for side in (self.entries, self.units) if side}
        if len(names) != 1:
            raise ValueError(f"the sides of a method have one name, got {sorted(names) or 'no side'}")

    @property
    def name(self) -> str:
        """The name that users type."""
        return (self.entries or self.units).name  # type: ignore[union-attr]  # one side is there at least


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(magnitude.random, structured.random),
        Method(magnitude.magnitude, structured.magnitude),
        Method(wanda.wanda),
        Method(magnitude.rtn),
        Method(sparsegpt.gptq),
        Method(sparsegpt.sparsegpt),
        Method(sparsegpt.absorb),
        Method(sparsessm.vote, structured.vote),
        Method(sparsessm.weighted),
        Method(None, structured.ghost),
        Method(None, structured.change),
        Method(None, structured.balanced),
        Method(exact.exact, structured.exact),
    )
}
# Of each target family, the method that won our measurements (docs/methods.md); of whole units, too.
DEFAULTS: Mapping[str, str] = {
    "ssm": "exact",
    "projections": "absorb",
    "conv1d": "absorb",
    "head": "absorb",
    "embedding": "absorb",
}
UNITS_DEFAULT = "exact"


def entry_methods() -> dict[str, EntryMethod]:
    """The methods that score single entries, by name."""
    return {name: row.entries for name, row in METHODS.items() if row.entries}


def unit_methods() -> dict[str, UnitMethod]:
    """The methods that choose whole units, by name."""
    return {name: row.units for name, row in METHODS.items() if row.units}


__all__ = [
    "DEFAULTS",
    "METHODS",
    "UNITS_DEFAULT",
    "EntryMethod",
    "Method",
    "Rule",
    "UnitMethod",
    "entry_methods",
    "unit_methods",
]
