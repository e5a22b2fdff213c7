"""Which step of the dial gives the bits that are asked for: foretold from a sweep of some rows, then met as
the walk goes.

Place in the flow: a survey of the dense model gives each matrix a `Curve` (stage 1), and before each matrix
is rounded `step` says the step, from the curves of those to come and the bits of those that are done. One
constant for all matrices is what costs least; it moves only by what the curves missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparsessm.methods.grids import Rounder, thrift_of, thrifty
from sparsessm.methods.hessian import Factor
from sparsessm.methods.levels import coded_bits, factor_bits, row_bits
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import sweep

ROWS = 96  # of a matrix that are swept at every step
CODED = 1 << 17  # of its entries, about, that are coded at every step
COUNTED = 1 << 14  # rows at most whose bits are counted at every step: a vocabulary has many more
CHEAPEST = 1e-40  # price of a row that costs nothing: its step must be a number
FINEST, COARSEST = -9, 3  # steps that are tried, as powers of two of the root mean square of a weight


@dataclass(frozen=True)
class Curve:
    """Bits of a matrix, everything counted, against the step.

    Attributes:
        steps: (S,) float64, ascending. bits: (S,) float64, of the whole matrix. least: with any step.
        entries: of it.
    """

    steps: Tensor
    bits: Tensor
    least: int
    entries: int

    def at(self, step: float) -> float:
        """Linear in the logarithm of the step; beyond the finest, a bit an entry more with each half step."""
        if not len(self.steps):
            return float(self.least)
        if step <= float(self.steps[0]):
            return float(self.bits[0]) + self.entries * math.log2(float(self.steps[0]) / step)
        above = int(torch.searchsorted(self.steps, step))
        if above == len(self.steps):
            return float(self.bits[-1])
        left, right = float(self.steps[above - 1]), float(self.steps[above])
        share = math.log(step / left) / math.log(right / left)
        return float(self.bits[above - 1]) * (1 - share) + float(self.bits[above]) * share


def step(curves: Sequence[Curve], bits: float) -> float:
    """The step at which these matrices take so many bits together, by bisection."""
    low, high = 1e-30, 1e30
    for _ in range(200):
        middle = math.sqrt(low * high)
        if sum(curve.at(middle) for curve in curves) > bits:
            low = middle
        else:
            high = middle
    return high


@final
class _Ladder(Rounder):
    """Rows with a step each, in float; counts, keeps nothing else."""

    def __init__(self, steps: Tensor, pivots: Tensor, thrift: Tensor) -> None:
        """steps: (rows,), of a pivot of 1. pivots: (in,). thrift: (rows,)."""
        self.group = len(pivots)
        self._steps, self._pivots, self._thrift = steps, pivots, thrift
        self.codes: list[Tensor] = []

    def reach(self, weight: Tensor, keep: Tensor, columns: slice) -> None:
        pass

    def round(self, weight: Tensor, keep: Tensor, column: int) -> Tensor:
        steps = self._steps * self._pivots[column]
        codes = thrifty(weight / steps, self._thrift) * keep
        self.codes.append(codes.short())
        return codes * steps


def foretell(weight: Tensor, factor: Factor, order: Tensor, prices: Tensor | None, gone: Tensor) -> Curve:
    """The curve of a matrix.

    What lies left of a weight changes it before it is rounded, so the bits of plain rounding are too few.
    They are taken of all rows (of a matrix of many `COUNTED`, evenly), and some rows say by how much a sweep
    takes more at every step. How many a file takes is measured, of so many rows that its tables hardly count.

    Args:
        weight: (out, in). order: (in,), in which columns are swept. factor: of its Hessian, in that order.
        prices: (out,) float64, in the unit of that Hessian; None where all rows have the same. gone: (out,
            in) bool, zero whatever the step.
    """
    every, columns = weight.shape
    counted = torch.arange(0, every, -(-every // COUNTED), device=weight.device)
    weight, gone = weight[counted][:, order], gone[counted][:, order]
    out, pivots = len(counted), factor.pivots
    units = torch.ones(out, dtype=torch.float64, device=weight.device)
    if prices is not None:
        units = prices[counted].clamp(min=CHEAPEST).rsqrt()
    size = weight.masked_fill(gone, 0.0) / pivots / units[:, None].to(weight.dtype)
    middle = float(size.double().square().mean().sqrt())
    if not middle > 0 or not math.isfinite(middle):
        nothing = torch.zeros(0, dtype=torch.float64)
        zeros = torch.zeros(every, columns, dtype=torch.int16)
        return Curve(nothing, nothing, factor_bits(every, columns) + coded_bits(zeros), every * columns)
    ladder = [middle * 2.0**power for power in range(FINEST, COARSEST + 1)]
    some = torch.arange(0, out, -(-out // ROWS), device=weight.device)
    few = torch.arange(0, out, -(-out * columns // CODED), device=weight.device)
    more, thrift = [], []
    for rung in ladder:
        values = size / rung
        thrifts = thrift_of(values)
        thrift.append(thrifts[some])
        codes = thrifty(values, thrifts[:, None])
        plain = row_bits(codes)
        stored = coded_bits(codes[few]) / plain[few].sum()  # columns are not alike
        more.append(stored * plain.sum() / plain[some].sum())
    chosen = weight[some].repeat(len(ladder), 1)
    steps = torch.cat([units[some] * rung for rung in ladder]).to(weight.dtype)
    rounding = _Ladder(steps, pivots, torch.cat(thrift))
    none = gone[some].repeat(len(ladder), 1)
    sweep(chosen, lambda now, part: now.abs(), Unstructured(), 0.0, factor, gone=none, rounding=rounding)
    swept = row_bits(torch.stack(rounding.codes, 1)).view(len(ladder), -1).sum(1)
    bits = swept * torch.stack(more) * (every / out)
    sides = factor_bits(every, columns)
    return Curve(torch.tensor(ladder, dtype=torch.float64), bits.cpu() + sides, sides, every * columns)
