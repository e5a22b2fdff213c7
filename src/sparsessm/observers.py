"""Stage 1, running sums of what a target does to the calibration windows. All are bounded in memory: nothing
of size (L, D, N).

An observer is fed by the block's forward, slab by slab in the order of time, each slab holding all windows
(calibrate.py). `options` asks the kernel for its statistics; letters as in architectures/base.py, formulas in
docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm.kernels import ScanStats
from sparsessm.patterns import Pattern


@dataclass(frozen=True)
class ErrorSums:
    """What removing entries of A_log does to the layer's output, as a quadratic form per channel, in
    residual-stream units.

    error(mask) = sum_d 1_d' G_d 1_d exactly, with the layer's input fixed and W_out' W_out taken as diagonal.
    """

    gram: Tensor  # (D, N, N) float64, or its diagonal (D, N)
    cross: Tensor  # (D, N) float64: error against the input that D carries
    power: Tensor  # (D,) float64: energy of that input
    signal: float  # energy of the layer's output in the same units


class StateError:
    """The Gram of output errors per channel (method `exact`)."""

    def __init__(self, removed: str, diagonal: bool) -> None:
        self.options: Mapping[str, Any] = {"removed": removed, "gram": "diagonal" if diagonal else "full"}
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._signal = 0.0

    def add(self, stats: ScanStats, output_energy: Tensor, output: Tensor) -> None:
        assert stats.gram is not None and stats.cross is not None and stats.power is not None
        gram = stats.gram * output_energy.view(-1, *[1] * (stats.gram.ndim - 1))
        cross, power = stats.cross * output_energy[:, None], stats.power * output_energy
        if self._sums is not None:
            gram, cross, power = (
                new.add_(old) for new, old in zip((gram, cross, power), self._sums, strict=True)
            )
        self._sums = gram, cross, power
        self._signal += float(output.square().sum((0, 1)).double() @ output_energy)

    def result(self) -> ErrorSums:
        assert self._sums is not None, "nothing was observed"
        return ErrorSums(*self._sums, self._signal)


class StateEnergy:
    """sum_t w_t (mean_b a_t)^2 S_t, S_t = sum_b h_{t-1}^2 (method `sparsessm`): a (D, N) float64 sum."""

    options: Mapping[str, Any] = {"energy": True}

    def __init__(self, weights: Tensor) -> None:
        """weights: (L,) w_t, one for each token position."""
        self._weights = weights.double()
        self._time = 0
        self._sum: Tensor | float = 0.0

    def add(self, stats: ScanStats, output_energy: Tensor, output: Tensor) -> None:
        assert stats.energy is not None and stats.decay is not None
        windows, length, _ = output.shape
        weights = self._weights[self._time : self._time + length] / windows**2  # of (sum_b a_t)^2
        by_time = stats.decay.square().mul_(stats.energy)  # (T, D, N)
        self._sum = self._sum + by_time.mul_(weights.float()[:, None, None]).sum(0).double()
        self._time += length

    def result(self) -> Tensor:
        assert isinstance(self._sum, Tensor), "nothing was observed"
        return self._sum


class StateVote:
    """How often an entry is among the smallest A_log^2 S_t of its step (method `sparsessm-vote`): a (D, N)
    count.

    The choice at each step is the pattern's own, so N:M votes inside its groups.
    """

    options: Mapping[str, Any] = {"energy": True}

    def __init__(self, a_log: Tensor, pattern: Pattern, sparsity: float) -> None:
        self._weight, self._pattern, self._sparsity = a_log.float().square(), pattern, sparsity
        self._votes = torch.zeros(a_log.shape, dtype=torch.int64)

    def add(self, stats: ScanStats, output_energy: Tensor, output: Tensor) -> None:
        assert stats.energy is not None
        self._votes += (~self._pattern.keep(stats.energy * self._weight, self._sparsity)).sum(0)

    def result(self) -> Tensor:
        return self._votes
