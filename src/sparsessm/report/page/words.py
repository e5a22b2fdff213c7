"""Numbers and the headline as words. Values of a file may be anything: what is no number is not said.

Place in the flow: below the sections of the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
NARROW = 0.02  # width of an interval around 0 that lets us say that nothing was lost
FRACTIONS = {
    1 / 10: "a tenth", 1 / 8: "an eighth", 1 / 6: "a sixth", 1 / 5: "a fifth", 1 / 4: "a quarter",
    1 / 3: "a third", 1 / 2: "half", 2 / 3: "two thirds", 3 / 4: "three quarters",
}  # fmt: skip


def real(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def at(value: Any, *keys: str) -> Any:
    """What lies under these names, one inside the other; None where there is no such place."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number_at(value: Any, *keys: str) -> float | None:
    """The same if it is a finite number."""
    return real(at(value, *keys))


def table_at(value: Any, *keys: str) -> Mapping[str, Any]:
    """The same if it has names itself; else empty."""
    found = at(value, *keys)
    return found if isinstance(found, Mapping) else {}


def rows_at(value: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The same if it is a list: its members that have names."""
    found = at(value, *keys)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list | tuple) else []


def figure(value: Any, form: str, unit: str = "") -> str:
    """A number in this format, with a real minus and an unbreakable unit."""
    found = real(value)
    if found is None:
        return NONE
    text = f"{found:{form}}"
    if float(text.replace(",", "").rstrip("%") or 0) == 0 and text[:1] in "+-":
        text = text[1:]
    return text.replace("-", "\u2212", text[:1] == "-") + (f"\u00a0{unit}" if unit else "")


def percent(share: Any, form: str = ".1f") -> str:
    """0.5 -> "50.0 %"."""
    found = real(share)
    return NONE if found is None else figure(100 * found, form, "%")


def change(share: Any) -> str:
    """A relative change with its sign, two digits that say something: 0.0143 -> "+1.4 %"."""
    found = real(share)
    if found is None:
        return NONE
    size = abs(100 * found)
    return percent(found, "+.0f" if size >= 10 else "+.1f" if size >= 0.95 else "+.2f")


def between(low: Any, high: Any) -> str:
    """The ends of an interval of a relative change; "" where there is none."""
    if real(low) is None or real(high) is None:
        return ""
    return f"{change(low)} to {change(high)}"


def size(value: Any) -> str:
    """Bytes for people: 1,960,123 -> "1.96 MB"."""
    found = real(value)
    if found is None:
        return NONE
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if found >= 10**power:
            text = figure(found / 10**power, "#.3g" if found < 1000 * 10**power else ",.0f")
            return f"{text.rstrip('.')}\u00a0{unit}"
    return figure(found, ",.0f", "bytes")


def times(ratio: Any) -> str:
    """1.73 -> "1.7 times"."""
    found = real(ratio)
    return NONE if found is None else figure(found, ".2f" if found < 1.095 else ".1f", "times")


def of_dense(ratio: float) -> str:
    """How many bytes are left: "a third of the bytes"."""
    for share, word in FRACTIONS.items():
        if abs(ratio - share) < 0.01:
            return f"{word} of the bytes"
    if abs(ratio - 1) < 0.005:
        return "as many bytes"
    return f"{percent(ratio, '.0f')} of the bytes"


def headline(sizes: Mapping[str, Any], difference: Mapping[str, Any], speed: Mapping[str, Any]) -> str:
    """The sentence on top, of what is known.

    Args:
        sizes: "result" and "dense": "weights", bytes. difference: "mean", "low", "high" of the perplexity.
        speed: "median", "low", "high" of how many times as fast it decodes.
    """
    parts = []
    ours, dense = (number_at(sizes, name, "weights") for name in ("result", "dense"))
    if ours is not None and dense:
        parts.append(of_dense(ours / dense))
    if (mean := number_at(difference, "mean")) is not None:
        low, high = number_at(difference, "low"), number_at(difference, "high")
        if low is not None and high is not None and low <= 0 <= high:
            small = high - low < NARROW
            parts.append("no measurable loss of perplexity" if small else f"perplexity {between(low, high)}")
        else:
            parts.append(f"{change(mean)} perplexity")
    if (median := number_at(speed, "median")) is not None:
        low, high = number_at(speed, "low"), number_at(speed, "high")
        alike = low is not None and high is not None and low <= 1 <= high
        parts.append("as fast as before" if alike else f"{times(median)} as fast")
    if not parts:
        return "A compressed model; its cost was not measured"
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def plainly(value: Any) -> str:
    """Any plain value in words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {plainly(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plainly, value))
    return "" if value is None or value is False else str(value)


def bin_words(edges: Sequence[float], place: int) -> str:
    """A bin of a histogram, by its lower edges."""
    if place == 0:
        return f"below {figure(edges[1], '.1e')}" if len(edges) > 1 else "all"
    if place == len(edges) - 1:
        return f"{figure(edges[place], '.1e')} and more"
    return f"{figure(edges[place], '.1e')} to {figure(edges[place + 1], '.1e')}"
