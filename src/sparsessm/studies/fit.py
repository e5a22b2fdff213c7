"""How small may a model be? Sizes are tried until the smallest is found that keeps to every limit.

    limits.py   what is asked, and whether a point keeps to it
    search.py   which size to try next
    unseen.py   which windows are searched on, and which are kept for the end
    trials.py   one size tried: pruned, measured, kept
    shown.py    the page about what was found
    fit.py      the search, the verification, the finding

Place in the flow: above one run (run.py), which it repeats. What a run learns of the dense model (its own
perplexity, prices, survey) is the same at every size and is done once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparsessm.evaluation.perplexity import Difference
from sparsessm.recipe.fits import LEAST_BITS, MOST_BITS
from sparsessm.report.record import finite, percent
from sparsessm.studies.limits import COST, QUALITY, Limits, Point
from sparsessm.studies.search import AIM, following, on_grid
from sparsessm.studies.search import QUALITY as BY_QUALITY
from sparsessm.studies.search import SPEED as BY_SPEED

FORMAT = 1
MOST = 6  # sizes that a search tries
LARGER = 2  # more, where the text that the search did not see says that one is too small
SURE = 0.05  # of a logarithm: a speed missed by more is no noise
# Increase of perplexity at so many bits (docs/results.md): only where a search begins depends on it.
USUAL = ((2.25, 0.0872), (3.25, 0.0143), (4.25, 0.0036))
UPPER = 1.4  # the upper end of an interval is about so many times the increase


@dataclass(frozen=True)
class Finding:
    """What a search found, and why it did not take something else.

    Attributes:
        asked: the limits. points: all sizes that were tried, in that order. chosen: the one that is written;
            None: nothing is feasible.
        nearest: where nothing is, the point that misses least; None where no size could be tried.
        verified: change of perplexity of the chosen model, read again from its file, on windows that the
            search did not see. None where nothing is chosen.
        why: sentences: what was chosen, what the next smaller one missed, what was verified.
        about: plain values: model, text, windows, recipe, perplexity of the dense model, seconds.
    """

    asked: Limits
    points: tuple[Point, ...]
    chosen: Point | None
    nearest: Point | None
    verified: Difference | None
    why: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Whether anything was chosen."""
        return self.chosen is not None

    def record(self) -> dict[str, Any]:
        """The content of fit.json (docs/fit.md): plain values."""
        refused = [point for point in self.points if point is not self.chosen and point.why]
        return finite(
            {
                "format": FORMAT,
                "asked": self.asked.record(),
                "feasible": self.feasible,
                "chosen": self.chosen and self.chosen.record(),
                "nearest": self.nearest and self.nearest.record(),
                "verified": self.verified and asdict(self.verified),
                "why": list(self.why),
                "refused": [{"bits": point.bits, "why": list(point.why)} for point in refused],
                "points": [point.record() for point in self.points],
                **self.about,
            }
        )


def first_guess(limits: Limits) -> float:
    """Bits at which a search begins: where a usual model would be at the limit."""
    if limits.increase is None:
        return USUAL[-1][0]
    wanted = math.log(limits.increase / UPPER) + AIM
    (low, much), (middle, some), (high, little) = ((bits, math.log(value)) for bits, value in USUAL)
    if wanted > some:
        bits = low + (much - wanted) / (much - some) * (middle - low)
    else:
        bits = middle + (some - wanted) / (some - little) * (high - middle)
    return min(max(bits, LEAST_BITS), MOST_BITS)


def search(
    measure: Callable[[float], Point], limits: Limits, span: tuple[float, float], most: int = MOST
) -> list[Point]:
    """Try sizes until the best is known; at most `most` of them.

    With a limit on quality that is the smallest size that keeps to all limits. Without one every smaller
    size would do, and is worse: then it is the largest.

    Args:
        measure: tries a number of bits. span: the least and the most that are possible.

    Returns:
        The points in the order in which they were measured, judged.
    """
    by_quality = limits.of_quality
    names, slope = (QUALITY, BY_QUALITY) if by_quality else (COST, BY_SPEED)
    first = first_guess(limits) if by_quality else span[1]
    points: list[Point] = []
    while len(points) < most:
        seen = [(point.bits, limits.miss(point, names)) for point in points]
        if by_quality and any(_hopeless(limits, point) for point in points):
            break
        if (bits := following(seen, first, span, slope)) is None:
            break
        points.append(limits.judged(measure(bits)))
    return points


def _hopeless(limits: Limits, point: Point) -> bool:
    """Whether it is too bad and too slow: fewer bits are worse, more are slower."""
    return limits.miss(point, QUALITY) > 0 and limits.miss(point, COST) > SURE


def best(points: list[Point], limits: Limits) -> Point | None:
    """Of the feasible ones the smallest; without a limit on quality the largest."""
    fits = [point for point in points if point.feasible]
    if not fits:
        return None
    return (min if limits.of_quality else max)(fits, key=lambda point: point.bits)


def nearest(points: list[Point], limits: Limits) -> Point | None:
    """The one whose worst miss is least."""
    if not points:
        return None
    return min(points, key=lambda point: limits.miss(point, (*QUALITY, *COST)))


Verify = Callable[[Point], Difference]


def fitted(
    measure: Callable[[float], Point],
    verify: Verify,
    limits: Limits,
    span: tuple[float, float],
    most: int = MOST,
) -> Finding:
    """Search, then verify what is chosen; a size that fails on unseen text makes room for a larger one.

    Args:
        measure, span, most: as of `search`. verify: change of perplexity of a point on windows that the
            search did not see.
    """
    points = search(measure, limits, span, most)
    failed: dict[float, str] = {}
    smallest = span[0]
    for tried in range(LARGER + 1):
        fits = [point for point in points if point.feasible and point.bits > smallest - 1e-9]
        chosen = best(fits, limits)
        if chosen is None:
            break
        found = verify(chosen)
        if limits.increase is None or found.high <= limits.increase:
            told = _told(limits, points, chosen, found, failed)
            return Finding(limits, tuple(points), chosen, None, found, told)
        why = (
            f"on text that the search did not see, perplexity rises by up to {percent(found.high)}; "
            f"max-increase is {limits.said.get('max-increase', limits.increase)}"
        )
        failed[chosen.bits] = f"{chosen.bits:g} bits kept to the limits on the search's text, but {why}."
        points[points.index(chosen)] = replace(chosen, feasible=False, why=(why,))
        smallest = chosen.bits + 0.02
        left = any(point.feasible and point.bits > smallest for point in points)
        if tried < LARGER and not left and smallest < span[1]:
            miss = math.log(found.high / limits.increase) if math.isfinite(found.high) else 1.0
            bits = on_grid(max(smallest, chosen.bits + (miss - AIM) / BY_QUALITY.usual), *span)
            points.append(limits.judged(measure(bits)))
    near = nearest([point for point in points if not point.feasible], limits)
    return Finding(limits, tuple(points), None, near, None, (*failed.values(), _nothing(near)))


def _told(
    limits: Limits, points: list[Point], chosen: Point, found: Difference, failed: Mapping[float, str]
) -> tuple[str, ...]:
    """Sentences on a choice."""
    speed = f", and it decodes {chosen.speed:,.0f} tokens/s here" if chosen.speed is not None else ""
    what = "smallest" if limits.of_quality else "largest"
    size = f"the file takes {chosen.bytes / 1e6:.4g} MB{speed}"
    first = f"{chosen.bits:g} bits a weight is the {what} size found: {size}."
    beyond = [point for point in points if not point.feasible]
    below = [point for point in beyond if (point.bits < chosen.bits) is limits.of_quality]
    if below:
        other = (max if limits.of_quality else min)(below, key=lambda point: point.bits)
        second = failed.get(other.bits, f"{other.bits:g} bits was refused: {'; '.join(other.why)}.")
    elif limits.of_quality:
        second = "Nothing smaller was refused: it is close to the limit already, or at the lower end."
    else:
        second = "Without a limit on quality the largest size that fits is taken, as smaller ones are worse."
    third = (
        f"Read again from its file, on text that the search did not see, perplexity changes by "
        f"{percent(found.mean, '+')} ({percent(found.low, '+')} to {percent(found.high, '+')})."
    )
    return (first, second, third, *(why for bits, why in failed.items() if why != second))


def _nothing(near: Point | None) -> str:
    """Why nothing is feasible."""
    if near is None:
        return "No size is feasible."
    return f"No size is feasible. Nearest is {near.bits:g} bits a weight: {'; '.join(near.why)}."
