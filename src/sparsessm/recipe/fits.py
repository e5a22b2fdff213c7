"""What of a `Choice` fits together: whole units, grids, and what a repair is called.

Place in the flow: fields.py checks every field by itself and asks here whether they fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..methods import UNITS_DEFAULT, entry_methods, unit_methods
from ..methods.allocation import ALLOCATIONS
from ..methods.allocation import parse as parse_allocation
from ..methods.patterns import Structured

if TYPE_CHECKING:
    from .fields import Choice

REPAIRS = ("none", "self", "dense-target")
LEAST_BITS, MOST_BITS = 1.5, 9.0


def fits_units(choice: Choice, pattern: Structured) -> None:
    """Refuse what has no effect on a structured pattern.

    Raises:
        ValueError: names it.
    """
    given = f"pattern {str(pattern)!r}"
    idle = [name for name in ("removed", "diagonal", "time_weights", "grid", "bits") if name in choice.chosen]
    if idle:
        raise ValueError(f"{idle[0]} has no effect with {given}, which removes whole units")
    known = unit_methods()
    if choice.method and choice.method not in known:
        raise ValueError(
            f"method {choice.method!r} scores single entries; methods for {given}: {', '.join(known)}"
        )
    method = known[choice.method or UNITS_DEFAULT]
    if choice.allocation and choice.allocation not in (
        allowed := [row.name for row in ALLOCATIONS.values() if row.by_layer or row.share is None]
    ):
        raise ValueError(f"allocation is {choice.allocation!r}; with {given}: {', '.join(allowed)}")
    if differs(choice) and [axis for axis, _ in pattern.shares] != ["channel"]:
        raise ValueError(
            f"allocation {choice.allocation!r} supports only pattern 'structured:channel', "
            f"got {str(pattern)!r}"
        )
    if differs(choice) and not method.eliminates:
        able = " or ".join(repr(name) for name, row in known.items() if row.eliminates)
        raise ValueError(
            f"allocation {choice.allocation!r} with pattern 'structured:channel' needs method {able}, "
            f"got {choice.method!r}"
        )
    if pattern.mixed and choice.sparsity is not None:
        raise ValueError(
            f"sparsity is {choice.sparsity:g}, but {given} already gives a share for each axis; "
            "give only one of them"
        )
    if choice.sparsity == 0:
        raise ValueError(f"sparsity is 0; {given} removes at least one unit; give a sparsity above 0")
    if choice.repair and parse_repair(choice.repair)[0] == "self":
        raise ValueError(f"repair is {choice.repair!r}; with {given}: none, dense-target[:STRENGTH]")
    if method.projects and choice.repair not in (None, "none"):
        raise ValueError(f"repair has no effect with method {choice.method!r}, which changes no other weight")
    if method.projects:
        if [axis for axis, _ in pattern.shares] != ["state"]:
            raise ValueError(
                f"method {choice.method!r} needs the pattern structured:state, got {str(pattern)!r}"
            )
    if choice.price == "norms":
        raise ValueError(f"price is 'norms'; with {given}: none, fisher")


def differs(choice: Choice) -> bool:
    """Whether layers may keep different numbers of units."""
    return bool(choice.allocation) and parse_allocation(choice.allocation or "")[0].by_layer


def fits_grid(choice: Choice) -> None:
    """Refuse what has no effect beside a grid.

    Raises:
        ValueError: names it.
    """
    if choice.bits is None:
        return
    if choice.grid:
        raise ValueError(
            f"bits is {choice.bits:g}, but grid {choice.grid!r} already says how many; give only one of them"
        )
    if choice.sparsity is not None and not choice.pattern:
        raise ValueError(
            f"sparsity is {choice.sparsity:g}, but with bits {choice.bits:g} zeros are found by what they "
            "save; give only one of them"
        )
    if choice.allocation:
        raise ValueError(f"allocation {choice.allocation!r} has no effect with bits, which has one step for all")


def on_grid(choice: Choice) -> bool:
    """Whether matrices are rounded to a grid: then nothing is pruned unless asked to."""
    row = entry_methods().get(choice.method or "")
    return bool(choice.grid or choice.bits or (row and "grid" in row.defaults))


def parse_repair(text: str) -> tuple[str, float]:
    """Name and strength of "none", "self" or "dense-target[:STRENGTH]".

    Raises:
        ValueError: anything else, with what is allowed.
    """
    name, _, number = text.partition(":")
    try:
        strength = float(number) if number else 1.0
    except ValueError:
        strength = -1.0
    if name not in REPAIRS or (number and name != "dense-target") or not 0 <= strength <= 1:
        raise ValueError(
            f"repair is {text!r}; allowed: none, self, dense-target[:STRENGTH] with a strength from 0 to 1"
        )
    return name, strength
