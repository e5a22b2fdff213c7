"""Taps for observers that compare two models: they are handed the inputs in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """A tap that keeps what it was fed last, of an expert with the tokens that it is of."""

    options: Mapping[str, Any] = {}
    paired, routed = False, True

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor | None] | None = None

    def add(self, x: Tensor, rows: Tensor | None = None) -> None:
        self._last = x, rows

    def take(self) -> tuple[Tensor, Tensor | None] | None:
        """What was kept, once: an expert may get no token of a slab."""
        last, self._last = self._last, None
        return last


class Pair:
    """A tap that hands an observer the inputs in both models; `dense` must be fed first.

    Experts: the tokens that the routers of both models sent there.
    """

    options: Mapping[str, Any] = {}
    paired, routed = False, True

    def __init__(self, observer: Any) -> None:
        self._observer, self.dense = observer, Recorder()

    def add(self, x: Tensor, rows: Tensor | None = None) -> None:
        last = self.dense.take()
        if last is None:
            return
        dense, dense_rows = last
        if rows is not None and dense_rows is not None:
            x, dense = x[:, torch.isin(rows, dense_rows)], dense[:, torch.isin(dense_rows, rows)]
            if not x.shape[1]:
                return
        self._observer.add(x, dense)


class Twice:
    """A tap that hands an observer of two models the inputs in the only one as those of both."""

    options: Mapping[str, Any] = {}
    paired = routed = False

    def __init__(self, observer: Any) -> None:
        self._observer = observer

    def add(self, x: Tensor) -> None:
        self._observer.add(x, x)
