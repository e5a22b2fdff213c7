"""How something is pruned: what a recipe and each of its rules can say, and whether it is of any use.

Place in the flow: a `Recipe` is a `Choice` for the whole model, its rules are choices for some targets;
rules.py makes a `Rule` of them for each target. Names are looked up in the tables they belong to (METHODS,
ALLOCATIONS, patterns): a new row there needs no change here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from ..data.foreign import short
from ..methods import DEFAULTS, METHODS, UNITS_DEFAULT, EntryMethod, entry_methods, unit_methods
from ..methods.allocation import ALLOCATIONS, listed
from ..methods.allocation import parse as parse_allocation
from ..methods.grids import parse as parse_grid
from ..methods.patterns import AXES, NofM, Structured, parse
from ..methods.sparsessm import time_weights
from .fits import LEAST_BITS, MOST_BITS, REPAIRS, fits_grid, fits_units, parse_repair

# Fields that only some methods read. Given with others only, they are refused, not ignored.
CHOICES = ("repair", "price", "allocation", "grid")
OPTIONS = sorted({option for method in entry_methods().values() for option in method.options} | set(CHOICES))
# Prices that mean something for some families only; allocations say it in their rows.
PRICED = {"fisher": ("ssm", "projections", "head", "embedding"), "norms": ("ssm", "projections", "conv1d")}
ON_GRIDS = ("projections", "head", "embedding")
MOST_SAMPLES = 100_000


def _defaults(option: str) -> str:
    """A sentence without its full stop: what the methods do where the option is not given."""
    found: dict[str, list[str]] = {}
    for name, method in entry_methods().items():
        if option in method.defaults:
            found.setdefault(method.defaults[option], []).append(name)
    said = [f"{value} ({', '.join(names)})" for value, names in found.items()]
    return f"By default {', '.join(said)}"


class Choice(BaseModel):
    """What is said; None: what the recipe says (in a rule), or the method's own.

    Raises:
        ValueError: one line that names the field, what was given and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str | None = Field(
        None,
        description=f"How entries are scored: {', '.join(entry_methods())}. By default "
        f"{DEFAULTS['ssm']} for A_log and {DEFAULTS['projections']} for matrices, also where the method "
        f"named does not apply. For whole units: {', '.join(unit_methods())}; by default {UNITS_DEFAULT}.",
    )
    sparsity: float | None = Field(
        None,
        description="Share to remove, from 0 to below 1. By default 0.5, or what an N:M pattern says. With "
        "whole units: the share of the units.",
    )
    pattern: str | None = Field(
        None,
        description="unstructured (the default); N:M (keep N of every M inputs or states); structured:AXIS "
        f"(whole units of one axis, the same number in every layer; axes: {', '.join(AXES)}); structured "
        "(the mix of axes that costs least).",
    )
    removed: Literal["memoryless", "unit"] | None = Field(
        None,
        description="What a removed entry of A_log becomes: memoryless (its state forgets at once; the "
        "default) or unit (A = -1). A removed weight of a matrix is 0.",
    )
    repair: str | None = Field(
        None,
        description="What the remaining weights restore: none; self (the layer's own output); "
        "dense-target[:STRENGTH] (its output in the dense model; STRENGTH from 0 to 1). "
        f"{_defaults('repair')}; other methods repair nothing.",
    )
    price: Literal["none", "fisher", "norms"] | None = Field(
        None,
        description="What an error in an output row costs: none (all rows the same), fisher (its effect on "
        "the loss, from one backward pass), norms (estimated from the weights that read the row). "
        f"{_defaults('price')}.",
    )
    allocation: str | None = Field(
        None,
        description=f"How the sparsity is shared among matrices: {listed()}, with numbers from 0 to 1. "
        f"{_defaults('allocation')}. With structured:channel on Mamba-1: uniform, or "
        "loss (each layer keeps as many channels as it needs; the result is a packed directory).",
    )
    grid: str | None = Field(
        None,
        description="Values that weights may take: int2 to int8, with a scale for each row and 64 columns "
        "(int4:128: 128 columns); or q4_0, those of llama.cpp's Q4_0, which `export` writes exactly. Then "
        "nothing is pruned unless sparsity or pattern says so. "
        f"{_defaults('grid')}; other methods leave values as they are.",
    )
    bits: float | None = Field(
        None,
        description=f"Stored bits a weight over the pruned matrices, masks and scales counted, "
        f"{LEAST_BITS:g} to {MOST_BITS:g}: one step for all weights, finer where an error costs more, and "
        "zeros where they save most; instead of sparsity and grid.",
    )
    diagonal: bool | None = Field(
        None, description="Method exact: use only the diagonal of the Gram matrix (cheaper, less exact)."
    )
    time_weights: str | None = Field(
        None,
        description="Method sparsessm: how time steps count. uniform, linear, power:P (the default, P = 1), "
        "discount:G or window:SHARE.",
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            lines = dict.fromkeys(_line(detail, type(self)) for detail in error.errors())
            raise ValueError("; ".join(lines)) from None

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str | None) -> str | None:
        return method if method is None else known("method", method, METHODS)

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            if ":" not in pattern:
                known("pattern", pattern, ["unstructured", "structured"], "or N:M, e.g. 2:4")
            parse(pattern)
        return pattern

    @field_validator("time_weights")
    @classmethod
    def _known_weights(cls, weights: str | None) -> str | None:
        if weights is not None:
            time_weights(weights, 2)
        return weights

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, allocation: str | None) -> str | None:
        if allocation is not None:
            if ":" not in allocation:
                known("allocation", allocation, ALLOCATIONS)
            parse_allocation(allocation)
        return allocation

    @field_validator("grid")
    @classmethod
    def _known_grid(cls, grid: str | None) -> str | None:
        return grid if grid is None else str(parse_grid(grid))

    @field_validator("bits")
    @classmethod
    def _is_a_rate(cls, bits: float | None) -> float | None:
        if bits is not None and not LEAST_BITS <= bits <= MOST_BITS:  # also refuses nan
            raise ValueError(f"bits is {bits:g}; allowed: {LEAST_BITS:g} to {MOST_BITS:g} (a weight)")
        return bits

    @field_validator("repair")
    @classmethod
    def _known_repair(cls, repair: str | None) -> str | None:
        if repair is not None:
            if ":" not in repair:
                known("repair", repair, REPAIRS)
            parse_repair(repair)
        return repair

    @field_validator("sparsity")
    @classmethod
    def _is_a_share(cls, sparsity: float | None) -> float | None:
        if sparsity is not None and not 0 <= sparsity < 1:  # also refuses nan
            raise ValueError(f"sparsity is {sparsity:g}; allowed: 0 <= sparsity < 1 (the share removed)")
        return sparsity

    @model_validator(mode="after")
    def _sparsity_fits_pattern(self) -> Self:
        pattern = parse(self.pattern or "unstructured")
        if isinstance(pattern, Structured):
            fits_units(self.chosen, pattern)
        elif self.method and not METHODS[self.method].entries and (units := METHODS[self.method].units):
            raise ValueError(
                f"method {self.method!r} chooses whole units; it needs a pattern structured:AXIS "
                f"({', '.join(units.axes)})"
            )
        if isinstance(pattern, NofM):
            if self.sparsity is not None and abs(self.sparsity - pattern.sparsity) > 1e-9:
                raise ValueError(
                    f"sparsity is {self.sparsity:g}, but pattern {self.pattern!r} keeps {pattern.n} of "
                    f"{pattern.m}, which is sparsity {pattern.sparsity:g}; give only one of them"
                )
            if self.allocation and parse_allocation(self.allocation)[0].share:
                raise ValueError(
                    f"allocation {self.allocation!r} has no effect with pattern {self.pattern!r}, "
                    "which fixes the number kept in every group"
                )
        fits_grid(self.chosen)
        return self

    @model_serializer(mode="wrap")
    def _without_what_says_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not chosen: what is written had an effect, and loads again."""
        return {name: value for name, value in handler(self).items() if value not in (None, (), [])}

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name in Choice.model_fields if (value := getattr(self, name)) is not None}

    def methods(self, families: Iterable[str]) -> dict[str, EntryMethod]:
        """The method of each family: the one named, or the family's default where it does not apply."""
        known = entry_methods()
        named = known.get(self.method or "")
        return {
            family: named if named and family in named.families else known[DEFAULTS[family]]
            for family in families
        }

    def idle(self, families: Iterable[str], method: str | None = None) -> dict[str, str]:
        """What is given without effect on `families`: field -> the sentence that says so.

        Args:
            method: that of the recipe, which counts in a rule that names none.
        """
        families = list(families)
        words = " or ".join(map(repr, families))
        found = {}
        known = entry_methods()
        if self.method and not set(row := known[self.method].families) & set(families):
            found["method"] = (
                f"method {self.method!r} does not prune target {words}; it prunes: {', '.join(row)}"
            )
        methods = Choice(method=self.method or method).methods(families).values()
        for option in OPTIONS:
            if option in self.chosen and not any(reads(row, option) for row in methods):
                names = " and ".join(repr(name) for name in dict.fromkeys(row.name for row in methods))
                readers = ", ".join(name for name, row in known.items() if reads(row, option))
                found[option] = f"{option} has no effect with method {names}; it belongs to: {readers}"
        for option in ("allocation", "price", "grid", "bits"):
            value = getattr(self, option)
            if value and option not in found and (home := homes(option, value)) and not {*home} & {*families}:
                found[option] = (
                    f"{option} {value!r} has no effect on target {words}; it belongs to: {', '.join(home)}"
                )
        if self.removed and "ssm" not in families:
            found["removed"] = f"removed is {self.removed!r}; it has an effect on target 'ssm' only"
        return found


def reads(method: EntryMethod, option: str) -> bool:
    """Whether the method looks at this field of `OPTIONS`."""
    return option in method.options or option in method.defaults


def homes(option: str, value: Any) -> tuple[str, ...]:
    """The families that this allocation, price, grid or number of bits means something for; empty: all."""
    if option in ("grid", "bits"):
        return ON_GRIDS
    return parse_allocation(value)[0].families if option == "allocation" else PRICED.get(value, ())


def applies(option: str, value: Any, family: str) -> bool:
    """Whether this allocation, price, grid or number of bits means something for targets of a family."""
    return family in (homes(option, value) or (family,))


def known(kind: str, given: str, names: Iterable[str], more: str = "") -> str:
    """Return `given` if it is one of `names`.

    Raises:
        ValueError: it is not; lists them and the nearest.
    """
    names = list(names)
    if given in names:
        return given
    near = difflib.get_close_matches(given, names, n=1)
    raise ValueError(
        f"unknown {kind} {short(given)}; known: {', '.join(names)}"
        + (f", {more}" if more else "")
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _line(detail: ErrorDetails, kind: type[Choice]) -> str:
    """One of pydantic's findings as one line."""
    loc, given = detail["loc"], detail["input"]
    field = str(loc[0]) if loc else ""
    if field == "rules" and len(loc) > 1:  # a rule says what is wrong with its fields
        title, loc, field = f"rule {int(loc[1]) + 1}: ", (), "it"
    else:
        title = ""
    try:
        if detail["type"] == "extra_forbidden":
            known("recipe field", field, kind.model_fields)
        if field == "samples":
            return f"samples is {short(given)}; allowed: a number from 1 to {MOST_SAMPLES}, or auto"
        if detail["type"] == "literal_error":
            annotation = kind.model_fields[field].annotation
            words = annotation if get_origin(annotation) is Literal else get_args(annotation)[0]
            known(field, str(given), get_args(words))
    except ValueError as error:
        return str(error)
    if detail["type"] == "missing":
        return f"{field} is missing"
    if detail["type"] == "value_error":
        return title + str(detail.get("ctx", {}).get("error", detail["msg"]))
    return f"{title}{field} is {short(given)}; {detail['msg'][:1].lower()}{detail['msg'][1:]}"
