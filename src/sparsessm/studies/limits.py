"""What a smaller model may cost and take, and whether one that was measured keeps to it.

Place in the flow: read from what a user types, before any work; `fit.py` asks it of every point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparsessm.data.foreign import bytes_of
from sparsessm.report.record import percent

TINY = 1e-5  # an increase or a drop below it counts as this
QUALITY, COST = ("max-increase", "max-drop"), ("max-size", "min-speed")


@dataclass(frozen=True)
class Point:
    """One size, measured.

    Attributes:
        bits: stored bits a weight. bytes: of the file of the weights.
        increase: of perplexity on the windows of the search; 0.02 is 2 % worse than the dense model. low,
            high: its paired 95 % interval.
        speed: tokens a second of one sequence in the runtime; None where it does not run the model.
        tasks: "drop" of the mean accuracy in shares (0.01 is one percentage point), its paired 95 % interval
            "low" and "high", "dense", "pruned" and "documents"; None where no tasks were asked for.
        feasible: it keeps to every limit. why: it does not, a sentence each.
    """

    bits: float
    bytes: int
    increase: float
    low: float
    high: float
    speed: float | None = None
    tasks: Mapping[str, Any] | None = None
    feasible: bool = False
    why: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"why": list(self.why)}


@dataclass(frozen=True)
class Limits:
    """What is asked; None: not asked.

    Attributes:
        increase: of perplexity, the upper end of its interval at most; 0.02 is 2 %.
        drop: of the mean accuracy of the tasks, likewise; 0.01 is one percentage point.
        size: bytes of the file of the weights, at most. speed: tokens a second, at least.
        tasks: names of them.
        said: name of an option -> what was given.
    """

    increase: float | None = None
    drop: float | None = None
    size: int | None = None
    speed: float | None = None
    tasks: tuple[str, ...] = ()
    said: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def parse(
        cls,
        *,
        max_increase: str | None = None,
        max_drop: str | None = None,
        max_size: str | None = None,
        min_speed: str | None = None,
        tasks: str | None = None,
    ) -> Limits:
        """Read what was typed: "2%" or "0.02", "500MiB", "20", "piqa,arc_easy".

        Raises:
            ValueError: none is given; one cannot be read or is impossible; tasks without their limit, or the
                other way round.
        """
        said = {
            "max-increase": max_increase,
            "max-drop": max_drop,
            "max-size": max_size,
            "min-speed": min_speed,
        }
        said = {name: text for name, text in said.items() if text is not None}
        if not said:
            raise ValueError(
                "no limit was given; give at least one of --max-increase, --max-drop (with --tasks), "
                "--max-size and --min-speed"
            )
        names = tuple(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))
        if max_drop is not None and not names:
            raise ValueError(f"max-drop is {max_drop}, but no task was named; name some with --tasks")
        if tasks is not None and max_drop is None:
            raise ValueError(f"tasks is {tasks!r}, which needs --max-drop: by how much accuracy may fall")
        size = None if max_size is None else bytes_of(max_size, "max-size")
        if size == 0:
            raise ValueError(f"max-size is {max_size}; allowed: a size above 0, such as 500MiB")
        return cls(
            None if max_increase is None else share(max_increase, "max-increase"),
            None if max_drop is None else share(max_drop, "max-drop"),
            size,
            None if min_speed is None else rate(min_speed, "min-speed"),
            names,
            said,
        )

    @property
    def of_quality(self) -> bool:
        """Whether anything bounds the bits from below."""
        return self.increase is not None or self.drop is not None

    def record(self) -> dict[str, Any]:
        """Plain values, by the names of the options."""
        values = (self.increase, self.drop, self.size, self.speed)
        return dict(zip((*QUALITY, *COST), values, strict=True)) | {"tasks": list(self.tasks)}

    def misses(self, point: Point) -> dict[str, float]:
        """By how much a point misses each limit that is asked, as a logarithm: at most 0 where it keeps it.

        Every one falls (`QUALITY`) or rises (`COST`) with the bits.
        """
        found: dict[str, float] = {}
        if self.increase is not None:
            found["max-increase"] = _log(point.high, self.increase)
        if self.drop is not None:
            assert point.tasks is not None, "tasks are measured where a drop is asked"
            found["max-drop"] = _log(point.tasks["high"], self.drop)
        if self.size is not None:
            found["max-size"] = _log(point.bytes, self.size)
        if self.speed is not None:
            found["min-speed"] = math.inf if point.speed is None else _log(self.speed, point.speed)
        return found

    def miss(self, point: Point, names: tuple[str, ...]) -> float:
        """The worst of these; minus infinity where none of them is asked."""
        return max((miss for name, miss in self.misses(point).items() if name in names), default=-math.inf)

    def judged(self, point: Point) -> Point:
        """The point with its verdict."""
        why = tuple(self.sentence(name, point) for name, miss in self.misses(point).items() if not miss <= 0)
        return replace(point, feasible=not why, why=why)

    def sentence(self, name: str, point: Point) -> str:
        """How a point misses a limit."""
        if name == "max-increase":
            what = f"perplexity rises by up to {percent(point.high)}"
        elif name == "max-drop":
            what = f"accuracy falls by up to {percent((point.tasks or {})['high'])}"
        elif name == "max-size":
            what = f"the file takes {point.bytes / 1e6:.4g} MB"
        else:
            what = f"it decodes {point.speed or 0:,.1f} tokens/s"
        return f"{what}; {name} is {self.said.get(name, self.record()[name])}"


def _log(value: float, limit: float) -> float:
    if math.isnan(value):
        return math.inf
    return math.log(max(value, min(TINY, limit)) / limit) if value < math.inf else math.inf


def share(text: str, what: str) -> float:
    """The share of "2%" or "0.02".

    Raises:
        ValueError: neither, not above 0, or a bare number that is more likely a percentage.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,9})?)\s*(%?)", text.strip(), re.ASCII)
    if not match or not float(match[1]):
        raise ValueError(f"{what} is {text!r}; allowed: a share above 0, such as 2% or 0.02")
    value = float(match[1])
    if match[2]:
        return value / 100
    if value >= 1:
        raise ValueError(f"{what} is {text}, which would be {100 * value:g} %; write {text}% for {value:g} %")
    return value


def rate(text: str, what: str) -> float:
    """Tokens a second.

    Raises:
        ValueError: no number above 0.
    """
    match = re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", text.strip(), re.ASCII)
    if not match or not float(text):
        raise ValueError(f"{what} is {text!r}; allowed: a number of tokens a second above 0, such as 20")
    return float(text)
