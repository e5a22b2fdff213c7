"""Limits as a user types them, and what a point misses."""

from __future__ import annotations

import math

import pytest

from sparsessm.studies.limits import Limits, Point

POINT = Point(3.0, 2_000_000, 0.010, 0.004, 0.016, 25.0, {"drop": 0.004, "low": -0.001, "high": 0.009})


def test_limits_are_read() -> None:
    limits = Limits.parse(
        max_increase="2%", max_drop="0.01", max_size="500 MiB", min_speed="20", tasks="piqa, arc_easy,piqa"
    )
    assert limits.increase == 0.02 and limits.drop == 0.01
    assert limits.size == 500 << 20 and limits.speed == 20
    assert limits.tasks == ("piqa", "arc_easy")
    assert Limits.parse(max_increase="0.5 %").increase == 0.005
    assert Limits.parse(max_increase="150%").increase == 1.5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no limit was given"),
        ({"max_increase": "2"}, "max-increase is 2, which would be 200 %; write 2% for 2 %"),
        ({"max_increase": "0%"}, "max-increase is '0%'; allowed: a share above 0"),
        ({"max_increase": "-1%"}, "max-increase is '-1%'"),
        ({"max_increase": "nan"}, "max-increase is 'nan'"),
        ({"max_increase": "1e-2"}, "max-increase is '1e-2'"),
        ({"max_increase": "٢%"}, "max-increase is"),
        ({"max_drop": "2", "tasks": "piqa"}, "max-drop is 2, which would be"),
        ({"max_drop": "1%"}, "max-drop is 1%, but no task was named"),
        ({"max_drop": "1%", "tasks": " , "}, "no task was named"),
        ({"max_increase": "1%", "tasks": "piqa"}, "needs --max-drop"),
        ({"max_size": "small"}, "max-size is 'small'; allowed: a size such as"),
        ({"max_size": "0"}, "max-size is 0; allowed: a size above 0"),
        ({"min_speed": "fast"}, "min-speed is 'fast'; allowed: a number of tokens a second"),
        ({"min_speed": "0"}, "min-speed is '0'"),
        ({"min_speed": "-3"}, "min-speed is '-3'"),
        ({"min_speed": "inf"}, "min-speed is 'inf'"),
    ],
)
def test_nonsense_is_refused_by_name(given: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError) as error:
        Limits.parse(**given)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        (Limits(increase=0.016), []),
        (Limits(increase=0.0159), ["perplexity rises by up to 1.60 %; max-increase is 0.0159"]),
        (Limits(drop=0.009, tasks=("piqa",)), []),
        (Limits(drop=0.005, tasks=("piqa",)), ["accuracy falls by up to 0.90 %; max-drop is 0.005"]),
        (Limits(size=2_000_000), []),
        (Limits(size=1_999_999), ["the file takes 2 MB; max-size is 1999999"]),
        (Limits(speed=25.0), []),
        (Limits(speed=25.1), ["it decodes 25.0 tokens/s; min-speed is 25.1"]),
        (
            Limits.parse(max_increase="1%", min_speed="30"),
            [
                "perplexity rises by up to 1.60 %; max-increase is 1%",
                "it decodes 25.0 tokens/s; min-speed is 30",
            ],
        ),
    ],
)
def test_the_upper_end_of_an_interval_is_held_to_a_limit(limits: Limits, missed: list[str]) -> None:
    judged = limits.judged(POINT)
    assert list(judged.why) == missed and judged.feasible == (not missed)
    assert judged.bits == POINT.bits and judged.record()["why"] == missed


def test_what_could_not_be_measured_keeps_to_nothing() -> None:
    alone = Point(3.0, 1000, 0.01, math.nan, math.nan, None)
    assert not Limits(increase=0.5).judged(alone).feasible
    assert not Limits(speed=1.0).judged(alone).feasible
    assert Limits(size=1000).judged(alone).feasible


def test_an_improvement_keeps_to_every_limit() -> None:
    better = Point(6.0, 1000, -0.002, -0.003, -0.001)
    assert Limits(increase=0.0001).judged(better).feasible
