"""Where a curve crosses a limit, with few measurements: pure arithmetic, which knows nothing of models.

Place in the flow: `fit.py` asks which size to try next, prunes to it, measures, and asks again. A measurement
is a number of bits and by how much it misses its limit, as a logarithm: 0 on the limit, above it missed. That
of a perplexity's increase falls almost linearly in bits (docs/results.md), so a line through two measurements
nearly hits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEAR = 0.1  # bits: who is so near to the crossing, on the right side, is there
AIM = -0.06  # a little on the right side, as what was measured is not what will be
GAIN = 0.03  # bits that are worth one more size
GRID = 0.01  # of bits: sizes that differ by less are one
STRIDE = 2.0  # bits at once, at most, while nothing is known of the other side


@dataclass(frozen=True)
class Slope:
    """How fast the logarithm is expected to fall with a bit, and between which values a line may be drawn."""

    usual: float
    least: float
    most: float


QUALITY = Slope(1.6, 0.5, 4.0)  # log of the increase of perplexity: 1.4 between 4 and 3 bits, 1.8 below
SPEED = Slope(-0.2, -1.0, -0.03)  # log of tokens a second: a smaller file is read faster


def following(
    measured: Sequence[tuple[float, float]], first: float, span: tuple[float, float], slope: Slope
) -> float | None:
    """What to measure next, in bits; None where nothing better can be expected.

    Args:
        measured: (bits, logarithm of the miss) so far, in any order; what is not finite is far off.
        first: to begin with. span: the least and the most bits that are possible.
        slope: of a miss that falls with bits (the fewest bits within the limit are looked for), or below 0 of
            one that rises with them (the most bits are).
    """
    if slope.usual < 0:  # the same, seen in a mirror
        mirrored = Slope(-slope.usual, -slope.most, -slope.least)
        found = following([(-x, y) for x, y in measured], -first, (-span[1], -span[0]), mirrored)
        return None if found is None else -found
    low, high = span
    if not measured:
        return on_grid(first, low, high)
    points = sorted((x, _bounded(y)) for x, y in measured)
    within = [x for x, y in points if y <= 0]
    right = min(within, default=None)
    left = max((x for x, y in points if y > 0 and (right is None or x < right)), default=None)
    if right is None and left is not None and left >= high - GRID:
        return None  # even there it is missed
    if right is not None and (right <= low + GRID or (left is not None and right - left <= NEAR)):
        return None
    fall = _fall(points, left, right, slope)
    known = dict(points)
    exact = 0.85 if len(points) > 1 else 0.65  # of the line: its slope was measured, or is only usual
    if right is not None and (-known[right] / fall <= NEAR * exact or (AIM - known[right]) / fall <= GAIN):
        return None
    anchor = min((x for x in (left, right) if x is not None), key=lambda x: abs(known[x]))
    found = anchor + (known[anchor] - AIM) / fall
    found = min(max(found, anchor - STRIDE), anchor + STRIDE)
    if left is not None and right is not None:  # inside, and not at the edge: a line may be wrong
        margin = 0.15 * (right - left)
        found = min(max(found, left + margin), right - margin)
    found = on_grid(found, low, high)
    return None if any(abs(found - x) < GRID / 2 for x, _ in points) else found


def on_grid(bits: float, low: float, high: float) -> float:
    """The nearest number of hundredths, within two bounds."""
    least, most = math.ceil(low / GRID - 1e-6), math.floor(high / GRID + 1e-6)
    return round(min(max(round(bits / GRID), least), most) * GRID, 2)


def _bounded(miss: float) -> float:
    return 10.0 if math.isnan(miss) else min(max(miss, -10.0), 10.0)


def _fall(
    points: Sequence[tuple[float, float]], left: float | None, right: float | None, slope: Slope
) -> float:
    """How fast the curve falls near its crossing: between both sides of it, else between the two nearest."""
    known = dict(points)
    if left is not None and right is not None:
        ends = left, right
    elif len(points) > 1:
        ends = tuple(sorted(sorted(known, key=lambda x: abs(known[x]))[:2]))
    else:
        return slope.usual
    fall = (known[ends[0]] - known[ends[1]]) / (ends[1] - ends[0])
    return min(max(fall, slope.least), slope.most)
