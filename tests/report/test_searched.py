"""What `fit` found, as the page shows it."""

from __future__ import annotations

from typing import Any

import pages
import pytest
import records

from sparsessm.report.page.document import page
from sparsessm.report.page.measured import Measured
from sparsessm.report.page.searched import searched
from sparsessm.studies.fit import Finding
from sparsessm.studies.limits import Limits, Point

LIMITS = Limits.parse(
    max_increase="2%", max_drop="1%", tasks="piqa,arc_easy", max_size="1.8MB", min_speed="20"
)
TASKS = {"drop": 0.001, "low": -0.002, "high": 0.004}


def finding(*points: Point, chosen: Point | None, limits: Limits = LIMITS) -> dict[str, Any]:
    about = {
        "model": "m",
        "text": {"search": {"sha256": "a"}, "verification": {"sha256": "b"}},
    }
    return Finding(limits, points, chosen, None, None, ("One.", "Two."), about).record()


def test_a_finding_of_ours() -> None:
    """The points come in order of size; of each stands there what became of it."""
    small = LIMITS.judged(Point(2.5, 1_500_000, 0.03, 0.02, 0.04, 30.0, TASKS))
    large = LIMITS.judged(Point(4.0, 2_000_000, 0.001, 0.0, 0.002, 10.0, TASKS))
    middle = LIMITS.judged(Point(3.0, 1_700_000, 0.01, 0.005, 0.015, 25.0, TASKS))
    also = LIMITS.judged(Point(3.1, 1_750_000, 0.009, 0.005, 0.014, 25.0, TASKS))
    found = searched(finding(large, small, middle, also, chosen=middle))
    assert [(row["bits"], row["note"]) for row in found["points"]] == [
        (2.5, "refused"), (3.0, ""), (3.1, "keeps to the limits"), (4.0, "refused"),
    ]  # fmt: skip
    assert found["points"][0] == {
        "bits": 2.5, "bytes": 1_500_000, "increase": 0.03, "low": 0.02, "high": 0.04, "note": "refused",
    }  # fmt: skip
    assert found["chosen"] == 3.0 and found["why"] == "One. Two." and found["held_out"] == ["a", "b"]
    assert found["refused"] == [
        "2.5 bits: perplexity rises by up to 4.00 %; max-increase is 2%",
        "4 bits: the file takes 2 MB; max-size is 1.8MB; it decodes 10.0 tokens/s; min-speed is 20",
    ]
    assert found["asked"].replace("\u00a0", " ") == (
        "Find the smallest size of m at which perplexity rises by at most 2 % (the upper end of its 95 % "
        "interval); the mean accuracy of piqa, arc_easy falls by at most 1 percentage point (the upper "
        "end of its 95 % interval); the file takes at most 1.80 MB; and our runtime decodes at least 20 "
        "tokens a second."
    )


def test_one_limit_that_is_not_of_quality() -> None:
    asked = searched(finding(chosen=None, limits=Limits.parse(max_size="1.8MB")))["asked"]
    assert (
        asked.replace("\u00a0", " ") == "Find the largest size of m at which the file takes at most 1.80 MB."
    )


@pytest.mark.parametrize(
    "value",
    [None, "x", -1, [], [[]], [{}], {}, {"bits": "x"}, pytest.param(10**400, id="huge"), True, pages.HOSTILE],
)
def test_a_file_may_hold_anything(value: Any) -> None:
    """Every field of the right shape but one, which is anything, and all of them."""
    whole = finding(Point(3.0, 17, 0.01, 0.0, 0.02), chosen=None)
    record = records.report().record()  # of no matrices: only the search is drawn
    for names in (*([name] for name in ("asked", "chosen", "points", "refused", "text", "why")), [*whole]):
        found = searched({**whole, **dict.fromkeys(names, value)})
        pages.Reader(page(record, Measured(), directory="x", fit=found))


@pytest.mark.parametrize(("rises", "powers"), [((0.05, 0.2), False), ((0.001, 90.0), True)])
def test_rises_that_are_far_apart_are_all_seen(rises: tuple[float, float], powers: bool) -> None:
    """Where the largest would flatten the others, the axis counts in powers of ten."""
    points = [
        {"bits": 3.0 - place, "bytes": 1e6 / (place + 1), "increase": rise, "low": -0.01, "high": 2 * rise}
        for place, rise in enumerate(rises)
    ]
    record = records.report().record()
    reader = pages.Reader(page(record, Measured(), directory="x", fit={"points": points, "chosen": 3.0}))
    assert ("10³" in reader.text) == powers
