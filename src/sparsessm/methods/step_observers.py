"""Observers of the published scores, which compare the states of all windows at every step of time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from sparsessm.kernels import ScanStats
from sparsessm.methods.observers import Adding
from sparsessm.methods.patterns import Pattern, Structured


class StepObserver(Adding):
    """An observer that needs each step of all windows at once: what it sums in a slab is complete when all
    lanes, and those of other processes, have gone through it."""

    options: Mapping[str, Any] = {"energy": True}

    def __init__(self) -> None:
        super().__init__()
        self._slab: dict[str, Tensor] = {}

    @final
    def add(self, stats: ScanStats, out_proj: Tensor, output: Tensor) -> None:
        assert stats.energy is not None and stats.decay is not None
        new = {"energy": stats.energy, "decay": stats.decay, "windows": torch.tensor(len(output))}
        for name, part in new.items():
            part = part.double()
            self._slab[name] = self._slab[name].add_(part) if name in self._slab else part

    @final
    def slab(self) -> dict[str, Tensor]:
        """Sums of this slab over the windows so far, float64; what another process saw may be added."""
        return self._slab

    @final
    def end_slab(self) -> None:
        """All windows have gone through the slab."""
        slab = self._slab
        self._slab = {}
        self._steps(slab["energy"], slab["decay"], int(slab["windows"]))

    @abstractmethod
    def _steps(self, energy: Tensor, decay: Tensor, windows: int) -> None:
        """Take what so many steps say: (T, D, N) each, sum_b h_{t-1}^2 and sum_b a_t."""


class StateEnergy(StepObserver):
    """sum_t w_t (mean_b a_t)^2 S_t, S_t = sum_b h_{t-1}^2 (method `sparsessm`): a (D, N) float64 sum."""

    def __init__(self, weights: Tensor) -> None:
        """weights: (L,) w_t, one for each token position."""
        super().__init__()
        self._weights = weights.double()
        self._time = 0
        self._energy: Tensor | None = None

    def _steps(self, energy: Tensor, decay: Tensor, windows: int) -> None:
        weights = self._weights[self._time : self._time + len(energy)] / windows**2  # of (sum_b a_t)^2
        part = decay.square().mul_(energy).mul_(weights[:, None, None]).sum(0)
        self._energy = part if self._energy is None else self._energy.add_(part)
        self._time += len(energy)

    def result(self) -> Tensor:
        assert self._energy is not None, "nothing was observed"
        return self._energy


class StateVote(StepObserver):
    """How often an entry is among the smallest A_log^2 S_t of its step (method `sparsessm-vote`): a (D, N)
    count.

    The choice at each step is the pattern's own, so N:M votes inside its groups.
    """

    def __init__(self, a_log: Tensor, pattern: Pattern, sparsity: float) -> None:
        super().__init__()
        self._weight, self._pattern, self._sparsity = a_log.double().square(), pattern, sparsity
        self._votes = torch.zeros_like(a_log, dtype=torch.int64)

    def _steps(self, energy: Tensor, decay: Tensor, windows: int) -> None:
        self._votes += (~self._pattern.keep(energy * self._weight, self._sparsity)).sum(0)

    def result(self) -> Tensor:
        return self._votes


class ColumnVote(StepObserver):
    """How often a state is among the `removing` least important of its step (`sparsessm-vote`, whole states):
    an (N,) count.

    The authors' rule (their prune/structure_ts.py): at every step each state n has the importance sum_d
    A_log[d, n]^2 S_t[d, n], and the states compete. Among equals the lower number gets the vote, so those of
    the first step, before which all states are zero, go to the lowest numbers.
    """

    def __init__(self, a_log: Tensor, removing: int) -> None:
        super().__init__()
        self._weight, self._removing = a_log.double().square(), removing
        self._votes = a_log.new_zeros(a_log.shape[1], dtype=torch.int64)

    def _steps(self, energy: Tensor, decay: Tensor, windows: int) -> None:
        importance = (energy * self._weight).sum(1)  # (T, N)
        if not torch.isfinite(importance).all():
            raise ValueError("the energies of its states are not finite")
        self._votes += (~Structured().keep(importance, self._removing)).sum(0)

    def result(self) -> Tensor:
        return self._votes
