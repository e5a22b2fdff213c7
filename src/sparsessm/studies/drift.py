"""Does the traffic look like the text that the model was pruned for? A fingerprint, and scores against it.

Place in the flow: after pruning, beside a deployed model. `traffic.py` takes snapshots of what a model
carries after a prompt; here are the statistics, which know no model.

A fingerprint is the snapshots of a reference text. Half of them say what is usual (mean, covariance, and how
each feature grows with the length of the prompt); the other half says how far usual blocks of snapshots
stray, by bootstrap, which gives the thresholds. A block is judged twice: by its mean (Hotelling's T^2), which
finds traffic that is all somewhat different, and by how far its snapshots lie out one by one (the mean
logarithm of their Mahalanobis distances), which finds some that are very different among usual ones. Blocks
are the last 16, 64 and 256 snapshots: few find a large shift soon, many find a small one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

BLOCKS = (16, 64, 256)  # snapshots that are judged together
QUANTILE = 0.998  # of usual means: one block in 500 of the usual text is over the threshold
DRAWS = 4000
RUN = 4  # neighbours drawn together: a text's windows resemble their neighbours
RIDGE = 0.05  # of each variance, added to it: some directions of few snapshots have none
LEAST = 64  # snapshots of a reference
BROKEN = 1e9  # score of a state that is not finite


@dataclass(frozen=True)
class Fingerprint:
    """Snapshots of a reference text.

    Attributes:
        names: of the features. features: (N, F) float32. lengths: (N,) tokens read before each.
        directions: of layers, unit vectors that `traffic.py` measures against.
        about: where it came from: plain values.
    """

    names: tuple[str, ...]
    features: np.ndarray
    lengths: np.ndarray
    directions: tuple[np.ndarray, ...]
    about: Mapping[str, Any]

    def detector(self, chosen: Sequence[str] | None = None) -> Detector:
        """What judges traffic by some of the features; None: by all.

        Raises:
            ValueError: fewer than `LEAST` snapshots, or one of them is not finite.
        """
        if len(self.features) < LEAST:
            raise ValueError(f"the fingerprint has {len(self.features)} snapshots; needed: {LEAST}")
        if not np.isfinite(self.features).all():
            raise ValueError("the fingerprint holds numbers that are not finite")
        names = self.names if chosen is None else tuple(name for name in self.names if name in chosen)
        columns = [self.names.index(name) for name in names]
        return Detector(names, columns, self.features[:, columns].astype(np.float64), self.lengths)


class Judged(NamedTuple):
    """What a block of snapshots is like.

    Attributes:
        block: so many snapshots. score: how strange they are; 1 is the threshold. alarm: it is above.
        strangest: features that stray most, with how many standard errors.
    """

    block: int
    score: float
    alarm: bool
    strangest: tuple[tuple[str, float], ...]

    @property
    def where(self) -> str:
        """The three that stray most, in words."""
        return ", ".join(f"{name} ({stray:+.1f})" for name, stray in self.strangest[:3])


class Detector:
    """Scores of blocks of snapshots."""

    def __init__(
        self, names: tuple[str, ...], columns: list[int], features: np.ndarray, lengths: np.ndarray
    ) -> None:
        """
        Args:
            columns: of a snapshot that are looked at. features: (N, F) of the reference, those columns.
        """
        self.names, self._columns = names, columns
        known, fresh = features[::2], features[1::2]
        basis = _basis(lengths[::2])
        self._growth = np.linalg.lstsq(basis, known, rcond=None)[0]  # (2, F): features by length
        rest = known - basis @ self._growth
        covariance = rest.T @ rest / max(len(rest) - 2, 1)
        variance = np.diag(covariance)
        scale = np.where(variance > 0, variance, 1.0)
        self._deviation = np.sqrt(scale)
        self._inverse = np.linalg.inv(covariance + np.diag(RIDGE * scale))
        self._usual = self.residuals(fresh, lengths[1::2])
        self._centre = float(np.log(self._distance(self._usual) + 1e-12).mean())

    def residuals(self, features: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(N, F) what the length of the prompt does not explain."""
        return features - _basis(lengths) @ self._growth

    @cached_property
    def _thresholds(self) -> dict[int, tuple[float, ...]]:
        """Of usual blocks of each size, at `QUANTILE`: T^2 of the mean, and mean of `_apart`."""
        generator = np.random.default_rng(0)
        count, found = len(self._usual), {}
        for block in BLOCKS:
            starts = generator.integers(0, count, (DRAWS, -(-block // RUN)))
            rows = (starts[:, :, None] + np.arange(RUN)).reshape(DRAWS, -1)[:, :block] % count
            means = np.stack([self._usual[some].mean(0) for some in rows])
            both = self._distance(means), self._apart(self._usual)[rows].mean(1)
            found[block] = tuple(float(np.quantile(one, QUANTILE)) for one in both)
        return found

    def _apart(self, residuals: np.ndarray) -> np.ndarray:
        """(n, F) -> (n,): how far each snapshot lies out, 0 for a usual one."""
        return np.log(self._distance(residuals) + 1e-12) - self._centre

    def _distance(self, means: np.ndarray) -> np.ndarray:
        """(n, F) -> (n,), Mahalanobis."""
        return np.einsum("nf,fg,ng->n", means, self._inverse, means)

    def judge(self, residuals: np.ndarray) -> Judged:
        """A block of snapshots, (block, F) of `residuals`; `block` is one of `BLOCKS`."""
        block, mean = len(residuals), residuals.mean(0)
        far, odd = self._thresholds[block]
        score = max(float(self._distance(mean[None])[0]) / far, float(self._apart(residuals).mean()) / odd)
        strays = mean / (self._deviation / np.sqrt(block))
        order = np.argsort(-np.abs(strays))[:5]
        strangest = tuple((self.names[i], float(strays[i])) for i in order)
        return Judged(block, score, score > 1, strangest)

    def watch(self) -> Watch:
        """Begin to look at traffic."""
        assert self._thresholds.keys() == {*BLOCKS}  # found now, not in the middle of the traffic
        return Watch(self)

    def take(self, snapshot: np.ndarray, length: int) -> np.ndarray:
        """(F,) residuals of a snapshot with all features of the fingerprint."""
        chosen = np.asarray(snapshot, dtype=np.float64)[self._columns]
        return self.residuals(chosen[None], np.array([length]))[0]


class Watch:
    """Traffic under way.

    Attributes:
        seen: snapshots so far. alarms: blocks over their threshold so far.
        last: of each size, the last block.
    """

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._recent: deque[np.ndarray] = deque(maxlen=max(BLOCKS))
        self.seen, self.alarms, self.last = 0, 0, dict[int, Judged]()

    def add(self, snapshot: np.ndarray, length: int) -> list[Judged]:
        """Take a snapshot; returns the blocks that it completes.

        One that is not finite is an alarm of its own, a block of score `BROKEN`.
        """
        self.seen += 1
        if not np.isfinite(snapshot).all():
            self.alarms += 1
            return [Judged(1, BROKEN, True, ())]
        self._recent.append(self._detector.take(snapshot, length))
        done = []
        for block in BLOCKS:
            if self.seen % block == 0 and len(self._recent) >= block:
                judged = self._detector.judge(np.stack(list(self._recent)[-block:]))
                self.last[block] = judged
                self.alarms += judged.alarm
                done.append(judged)
        return done


def _basis(lengths: np.ndarray) -> np.ndarray:
    """(N,) -> (N, 2): a constant, and the logarithm of the length."""
    return np.stack([np.ones(len(lengths)), np.log(lengths)], 1)
