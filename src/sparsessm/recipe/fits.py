"""What of a `Choice` fits together: whole units, grids, and what a repair is called.

Place in the flow: fields.py checks every field by itself and asks here whether they fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..methods import UNITS_DEFAULT, entry_methods, unit_methods
from ..methods.allocation import ALLOCATIONS
from ..methods.allocation import parse as parse_allocation
from ..methods.patterns import Structured

REPAIRS = ("none", "self", "dense-target")
LEAST_BITS, MOST_BITS = 1.5, 9.0


def fits_units(said: Mapping[str, Any], pattern: Structured) -> None:
    """Refuse what has no effect on a structured pattern.

    Args:
        said: `Choice.chosen`.

    Raises:
        ValueError: names it.
    """
    fields = ("method", "allocation", "repair", "price", "sparsity")
    named, allocation, repair, price, sparsity = (said.get(name) for name in fields)
    given = f"pattern {str(pattern)!r}"
    idle = [name for name in ("removed", "diagonal", "time_weights", "grid", "bits", "size") if name in said]
    if idle:
        raise ValueError(f"{idle[0]} has no effect with {given}, which removes whole units")
    known = unit_methods()
    if named and named not in known:
        raise ValueError(f"method {named!r} scores single entries; methods for {given}: {', '.join(known)}")
    method = known[named or UNITS_DEFAULT]
    if allocation and allocation not in (
        allowed := [row.name for row in ALLOCATIONS.values() if row.by_layer or row.share is None]
    ):
        raise ValueError(f"allocation is {allocation!r}; with {given}: {', '.join(allowed)}")
    if differs(said) and [axis for axis, _ in pattern.shares] != ["channel"]:
        raise ValueError(
            f"allocation {allocation!r} supports only pattern 'structured:channel', got {str(pattern)!r}"
        )
    if differs(said) and not method.eliminates:
        able = " or ".join(repr(name) for name, row in known.items() if row.eliminates)
        raise ValueError(
            f"allocation {allocation!r} with pattern 'structured:channel' needs method {able}, got {named!r}"
        )
    if pattern.mixed and sparsity is not None:
        raise ValueError(
            f"sparsity is {sparsity:g}, but {given} already gives a share for each axis; "
            "give only one of them"
        )
    if sparsity == 0:
        raise ValueError(f"sparsity is 0; {given} removes at least one unit; give a sparsity above 0")
    if repair and parse_repair(repair)[0] == "self":
        raise ValueError(f"repair is {repair!r}; with {given}: none, dense-target[:STRENGTH]")
    if method.projects and repair not in (None, "none"):
        raise ValueError(f"repair has no effect with method {named!r}, which changes no other weight")
    if method.projects:
        if [axis for axis, _ in pattern.shares] != ["state"]:
            raise ValueError(f"method {named!r} needs the pattern structured:state, got {str(pattern)!r}")
    if price == "norms":
        raise ValueError(f"price is 'norms'; with {given}: none, fisher")


def differs(said: Mapping[str, Any]) -> bool:
    """Whether layers may keep different numbers of units."""
    return "allocation" in said and parse_allocation(said["allocation"])[0].by_layer


def fits_grid(said: Mapping[str, Any]) -> None:
    """Refuse what has no effect beside bits or a size.

    Args:
        said: `Choice.chosen`.

    Raises:
        ValueError: names it.
    """
    names = ("bits", "size", "grid", "sparsity", "allocation")
    bits, size, grid, sparsity, allocation = (said.get(name) for name in names)
    if bits is None and size is None:
        return
    what, number = ("size", size) if bits is None else ("bits", f"{bits:g}")
    given = f"{what} {number}"
    if bits is not None and size is not None:
        raise ValueError(f"size is {size}, but bits {bits:g} already says how many; give only one of them")
    if grid:
        raise ValueError(
            f"{what} is {number}, but grid {grid!r} already says how many; give only one of them"
        )
    if sparsity is not None and "pattern" not in said:
        raise ValueError(
            f"sparsity is {sparsity:g}, but with {given} zeros are found by what they "
            "save; give only one of them"
        )
    if allocation:
        raise ValueError(f"allocation {allocation!r} has no effect with {given}, which has one step for all")


def on_grid(said: Mapping[str, Any]) -> bool:
    """Whether matrices are rounded to a grid: then nothing is pruned unless asked to."""
    row = entry_methods().get(said.get("method") or "")
    return bool(said.get("grid") or dialled(said) or (row and "grid" in row.defaults))


def dialled(said: Mapping[str, Any]) -> bool:
    """Whether stored bits are asked for."""
    return bool(said.get("bits") or said.get("size"))


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
