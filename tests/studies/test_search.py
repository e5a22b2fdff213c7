"""The search for the smallest size, on made-up models: curves that fall, steeply or not, with noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm.evaluation.perplexity import Difference
from sparsessm.recipe.fits import LEAST_BITS, MOST_BITS
from sparsessm.studies.fit import LARGER, MOST, best, first_guess, fitted, search
from sparsessm.studies.limits import Limits, Point

SPAN = (LEAST_BITS, MOST_BITS)
Curve = Callable[[float], float]


class Made:
    """A made-up model: the upper end of its increase and its speed by bits; counts what is asked."""

    def __init__(self, high: Curve, speed: Curve = lambda bits: 100.0) -> None:
        self.high, self.speed, self.asked = high, speed, []

    def __call__(self, bits: float) -> Point:
        self.asked.append(bits)
        high = self.high(bits)
        return Point(bits, round(1e6 * bits), 0.7 * high, 0.4 * high, high, self.speed(bits))


def falling(crossing: float, slope: float, bend: float, limit: float) -> Curve:
    """An increase that is at its limit at `crossing`; the slope is nats a bit there, `bend` what it loses."""

    def high(bits: float) -> float:
        away = bits - crossing
        return limit * math.exp(-slope * away * (1 - bend * away / (1 + abs(away))))

    return high


@settings(max_examples=300, deadline=None)
@given(
    crossing=st.floats(1.6, 8.5),
    slope=st.floats(1.0, 2.5),
    bend=st.floats(-0.3, 0.3),
    limit=st.floats(0.001, 0.5),
)
def test_on_smooth_curves_the_smallest_size_is_found_within_a_tenth_of_a_bit(
    crossing: float, slope: float, bend: float, limit: float
) -> None:
    model, limits = Made(falling(crossing, slope, bend, limit)), Limits(increase=limit)
    points = search(model, limits, SPAN)
    chosen = best(points, limits)
    assert len(points) == len(model.asked) <= MOST
    assert chosen is not None and chosen.high <= limit
    assert crossing - 1e-9 <= chosen.bits <= crossing + 0.1 + 0.03  # sizes lie on a grid of 0.01


def test_a_usual_model_takes_three_sizes_or_fewer() -> None:
    """That of docs/results.md, whose increase is 8.72, 1.43 and 0.36 % at 2.25, 3.25 and 4.25 bits."""
    for limit in (0.005, 0.01, 0.02, 0.05, 0.1):
        model = Made(falling(first_guess(Limits(increase=limit)) + 0.15, 1.6, 0.1, limit))
        assert len(search(model, Limits(increase=limit), SPAN)) <= 3


@settings(max_examples=300, deadline=None)
@given(
    crossing=st.floats(0.0, 12.0),
    slope=st.floats(0.2, 4.0),
    noise=st.lists(st.floats(-0.5, 0.5), min_size=2 * MOST, max_size=2 * MOST),
    high=st.floats(1.5, 9.0),
)
def test_whatever_the_noise_a_search_ends_on_what_was_measured_to_be_feasible(
    crossing: float, slope: float, noise: list[float], high: float
) -> None:
    limits = Limits(increase=0.02)
    smooth, shifts = falling(crossing, slope, 0.0, 0.02), iter(noise)
    model = Made(lambda bits: smooth(bits) * math.exp(next(shifts)))
    points = search(model, limits, (LEAST_BITS, high))
    assert len(points) <= MOST and len({point.bits for point in points}) == len(points)
    assert all(LEAST_BITS - 1e-9 <= point.bits <= high + 1e-9 for point in points)
    for point in points:
        assert point.feasible == (point.high <= 0.02) and bool(point.why) != point.feasible
    chosen = best(points, limits)
    feasible = [point.bits for point in points if point.high <= 0.02]
    assert (chosen is None) == (not feasible)
    assert chosen is None or chosen.bits == min(feasible)


def test_a_limit_that_nothing_keeps_to_ends_at_the_largest_size() -> None:
    model, limits = Made(lambda bits: 0.5 + 1 / bits), Limits(increase=0.01)
    points = search(model, limits, SPAN)
    assert not best(points, limits) and points[-1].bits == MOST_BITS and len(points) <= MOST


def test_a_limit_that_everything_keeps_to_ends_at_the_smallest_size() -> None:
    points = search(Made(lambda bits: 1e-9), Limits(increase=0.3), SPAN)
    assert points[-1].bits == LEAST_BITS and len(points) <= 4


@pytest.mark.parametrize("ruined", [math.inf, math.nan])
def test_a_ruined_model_is_far_off_and_not_the_end(ruined: float) -> None:
    model = Made(lambda bits: ruined if bits < 4 else falling(4.5, 1.6, 0, 0.02)(bits))
    chosen = best(search(model, Limits(increase=0.02), SPAN), Limits(increase=0.02))
    assert chosen is not None and 4.5 <= chosen.bits <= 4.6


def test_a_size_that_quality_needs_and_speed_forbids_is_refused_at_once() -> None:
    """More bits are slower still: where quality asks for more, nothing is left to try."""
    model = Made(falling(6.0, 1.6, 0, 0.02), lambda bits: 30 / bits)
    limits = Limits(increase=0.02, speed=20.0)
    assert len(search(model, limits, SPAN)) == 1
    finding = fitted(model, never, limits, SPAN)
    assert not finding.feasible and finding.nearest is not None
    assert "tokens/s" in finding.why[-1] and "perplexity" in finding.why[-1]


def test_without_a_limit_on_quality_the_largest_size_is_taken() -> None:
    points = search(Made(falling(3.0, 1.6, 0, 0.02)), Limits(size=3_000_000), (1.5, 3.0))
    assert [point.bits for point in points] == [3.0] and points[0].feasible
    limits = Limits(speed=50.0)
    model = Made(falling(3.0, 1.6, 0, 0.02), lambda bits: 200 / (1 + bits))
    chosen = best(search(model, limits, SPAN), limits)
    assert chosen is not None and 2.8 <= chosen.bits <= 3.0
    assert len(model.asked) <= MOST


def never(point: Point) -> Difference:
    raise AssertionError("nothing is verified where nothing is chosen")


def test_unseen_text_has_the_last_word() -> None:
    """What looked well on the search's text and fails on the other is too small: the next size is taken."""
    limit, limits = 0.02, Limits(increase=0.02)
    model, verified = Made(falling(3.0, 1.6, 0, limit)), []

    def verify(point: Point) -> Difference:
        verified.append(point.bits)
        high = falling(3.2, 1.6, 0, limit)(point.bits)
        return Difference(0.7 * high, 0.4 * high, high)

    finding = fitted(model, verify, limits, SPAN)
    assert finding.chosen is not None and finding.verified is not None
    assert finding.chosen.bits == verified[-1] >= 3.2 and finding.verified.high <= limit
    assert verified == sorted(verified) and len(verified) >= 2
    failed = finding.record()["refused"]
    assert any("the search did not see" in why for one in failed for why in one["why"])
    told = [
        sentence for sentence in finding.why if "kept to the limits on the search's text, but" in sentence
    ]
    assert len(told) == len(verified) - 1 == len({*told})


def test_a_verification_that_never_holds_is_no_finding() -> None:
    model, limits = Made(falling(3.0, 1.6, 0, 0.02)), Limits(increase=0.02)
    finding = fitted(model, lambda point: Difference(0.3, 0.2, 0.4), limits, SPAN)
    assert not finding.feasible and finding.verified is None and finding.nearest is not None
    assert len(model.asked) <= MOST + LARGER + 1
    assert finding.why[-1].startswith("No size is feasible.")


def test_a_finding_says_it_in_three_sentences_and_in_plain_values() -> None:
    model, limits = Made(falling(3.0, 1.6, 0, 0.02)), Limits(increase=0.02)
    finding = fitted(model, lambda point: Difference(0.01, 0.005, 0.015), limits, SPAN)
    record = finding.record()
    assert len(finding.why) == 3 and record["why"] == list(finding.why)
    assert record["chosen"]["feasible"] and not record["chosen"]["why"]
    assert [point["bits"] for point in record["points"]] == model.asked
    assert {one["bits"] for one in record["refused"]} == {p.bits for p in finding.points if not p.feasible}
    assert record["asked"]["max-increase"] == 0.02 and record["verified"]["high"] == 0.015
