"""Stage 4, the values that a weight may take: integer codes times scales. Free of any model.

Two families. `Uniform`: 2 to 8 bits a weight, a scale for each row and group of columns (GPTQ, Frantar et
al., arXiv 2210.17323), among them Q4_0 of ggml, which llama.cpp runs. `Dial`: one step for the whole model;
that of a weight is step x U_jj / sqrt(F_i), as in WaterSIC (arXiv 2603.04956) with the prices of rows, and
what falls into its zero bin is pruned.

A `Grid` is what the recipe asks for, a `Rounding` is what it does to one matrix while the sweep (repair.py)
comes through, and `Levels` (levels.py) is what is left. Formulas in docs/methods.md.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparsessm.methods.levels import (
    MOST_CODE,
    SCALE_BITS,
    Levels,
    as_factors,
    as_scales,
)

GROUP = 64  # columns that share a scale: a block of the packed layout
WIDEST = 8  # bits of a code of fixed width
SHRINKS = [1 - share / 80 for share in range(49)]  # of the largest value, for which scales are tried
THRIFT = 0.1  # of the dial: what a bit is worth, in squares of the step
LARGE = 1.7  # mean size of the codes of a row, above which it has no thrift
FARTHEST_STEP = 4.0  # times a row's largest weight, with which it is zero
ALL = slice(None)  # rows
MANY = (
    1 << 14
)  # rows that are worked on at once, of which a vocabulary has more: it is in memory several times


class Rounder(ABC):
    """What the sweep rounds a matrix with: it is told where the sweep is, and rounds column after column.

    Attributes:
        group: columns that are reached together.
    """

    group: int

    @abstractmethod
    def reach(self, weight: Tensor, keep: Tensor, columns: slice) -> None:
        """The sweep reaches these columns: weight (out, group) as it is now, keep (out, group) bool."""

    @abstractmethod
    def round(self, weight: Tensor, keep: Tensor, column: int) -> Tensor:
        """The value (out,) that a column (out,) takes; 0 where it is not kept."""


class Rounding(Rounder):
    """What a grid does to one matrix.

    Attributes:
        prices: (out,) float64, what an error in each row costs; None: all the same.
    """

    prices: Tensor | None

    @abstractmethod
    def nearest(self, values: Tensor, cost: float | Tensor = 1.0, rows: slice = ALL) -> Tensor:
        """The codes of a column of values (rows,) in units of their scales, as the grid chooses them.

        Args:
            cost: of an error here, in units of what it costs in the sweep. rows: of the matrix.
        """

    @abstractmethod
    def levels(self) -> Levels:
        """All columns, when the last is rounded."""


class Grid(ABC):
    """What the recipe asks for. `str` gives the word of the recipe.

    Attributes:
        ordered: its scales follow the columns, which may then be swept in any order.
    """

    ordered: bool

    @abstractmethod
    def rounding(
        self, weight: Tensor, pivots: Tensor | None, masked: bool, prices: Tensor | None, largest: bool
    ) -> Rounding:
        """What it does to a matrix.

        Args:
            weight: (out, in), where the sweep starts. pivots: (in,) `Factor.pivots`, None without a Hessian.
            masked: a mask says what is zero.
            prices: (out,) float64, in the unit of the Hessian; None where all rows have the same.
            largest: scales are those of the largest value, as published, instead of the best.
        """


@dataclass(frozen=True)
class Alphabet:
    """The codes of a uniform grid of some bits.

    Attributes:
        kind: "whole": -2^(bits - 1) .. 2^(bits - 1) - 1; "odd": the odd ones of -(2^bits - 1) .. 2^bits - 1,
            all levels in use and none at zero; "nonzero": -m .. -1 and 1 .. m, m = 2^(bits - 1), where a mask
            says what is zero; "gapped": the whole ones without zero.
    """

    bits: int
    kind: str

    @property
    def most(self) -> int:
        """The largest code."""
        half = 2 ** (self.bits - 1)
        return {"whole": half - 1, "gapped": half - 1, "odd": 2 * half - 1, "nonzero": half}[self.kind]

    def nearest(self, values: Tensor) -> Tensor:
        """The code nearest to each value, both in units of the scale and of the same dtype."""
        if self.kind == "whole":
            return values.round().clamp(-self.most - 1, self.most)
        if self.kind == "odd":
            return (2 * (values / 2).floor() + 1).clamp(-self.most, self.most)
        sign = torch.where(values < 0, -1.0, 1.0).to(values.dtype)
        codes = values.abs().round().clamp(min=1) * sign
        return codes.clamp(-self.most - (self.kind == "gapped"), self.most)


@dataclass(frozen=True)
class Uniform(Grid):
    """`intB[:GROUP]`: codes of B bits, a scale for each row and GROUP columns.

    Attributes:
        blocks: as ggml's blocks: rows are whole groups, codes always the whole ones, scales of either sign.
    """

    bits: int
    group: int = GROUP
    blocks: bool = False
    ordered = False

    def __str__(self) -> str:
        if self.blocks:
            return f"q{self.bits}_0"
        return f"int{self.bits}" + (f":{self.group}" if self.group != GROUP else "")

    def stored(self, rows: int, columns: int, kept: int | None = None) -> int:
        """Bits of a matrix, `kept` of whose entries a mask keeps; None: there is no mask."""
        scales = SCALE_BITS * rows * -(-columns // self.group)
        return scales + (self.bits * rows * columns if kept is None else rows * columns + self.bits * kept)

    def alphabet(self, masked: bool, largest: bool) -> Alphabet:
        """Codes that its weights may take."""
        if self.blocks:
            return Alphabet(self.bits, "gapped" if masked and not largest else "whole")
        return Alphabet(self.bits, "whole" if largest else "nonzero" if masked else "odd")

    def rounding(
        self, weight: Tensor, pivots: Tensor | None, masked: bool, prices: Tensor | None, largest: bool
    ) -> Rounding:
        return _ByGroups(self, weight, pivots, masked, largest)


@final
class _ByGroups(Rounding):
    def __init__(
        self, grid: Uniform, weight: Tensor, pivots: Tensor | None, masked: bool, largest: bool
    ) -> None:
        self.group, self.prices = grid.group, None
        self._blocks = grid.blocks
        self._alphabet, self._largest, self._masked = grid.alphabet(masked, largest), largest, masked
        self._costs = torch.ones_like(weight[0]) if pivots is None else pivots.square().reciprocal()
        self._codes = weight.new_zeros(weight.shape, dtype=torch.int16).T.contiguous()  # (in, out)
        self._scales: list[Tensor] = []

    def reach(self, weight: Tensor, keep: Tensor, columns: slice) -> None:
        weight = weight.masked_fill(~keep, 0.0)
        if self._largest and self._blocks:
            # as ggml's quantize_row_q4_0_ref: the code of the value farthest from 0 is the lowest
            farthest = weight.gather(1, weight.abs().argmax(1, keepdim=True))[:, 0]
            scale = as_scales(farthest / (-self._alphabet.most - 1))
        elif self._largest:
            # GPTQ's symmetric grid: 2^bits - 1 steps from the largest value to its opposite
            scale = as_scales(weight.abs().amax(1) * 2 / (2**self._alphabet.bits - 1))
        else:
            scale = best_scales(weight, keep, self._costs[columns], self._alphabet, self._blocks)
        self._scales.append(scale)
        self._scale = scale.to(weight.dtype)

    def round(self, weight: Tensor, keep: Tensor, column: int) -> Tensor:
        codes = self.nearest(weight / self._scale).masked_fill(~keep, 0.0)
        self._codes[column] = codes.short()
        return codes * self._scale

    def nearest(self, values: Tensor, cost: float | Tensor = 1.0, rows: slice = ALL) -> Tensor:
        return self._alphabet.nearest(values)

    def levels(self) -> Levels:
        rows, width = torch.stack(self._scales, 1), self._alphabet.bits
        return Levels(self._codes.T.contiguous(), rows, None, self.group, width, self._masked)


def best_scales(
    weight: Tensor, keep: Tensor, costs: Tensor, alphabet: Alphabet, signed: bool = False
) -> Tensor:
    """(out,) float16: of each row the scale with the least sum of costs_j (w_j - Q(w_j))^2 over the
    survivors.

    A search over shares of the largest value, then least squares with the codes of the best.

    Args:
        weight: (out, columns). keep: (out, columns) bool. costs: (columns,), 1 / U_jj^2.
        signed: a scale may be negative, which turns round codes that reach farther on one side.
    """
    costs = costs * keep
    most = weight.abs().amax(1)
    best = torch.full_like(most, torch.inf)
    scale = most.new_ones(most.shape)

    def consider(tried: Tensor) -> None:
        nonlocal best, scale
        tried = as_scales(tried).to(weight.dtype)
        codes = alphabet.nearest(weight / tried[:, None])
        error = ((weight - codes * tried[:, None]).square() * costs).sum(1)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)

    for share in SHRINKS:
        consider(most * (share / alphabet.most))
        if signed:
            consider(most * (-share / alphabet.most))
    for _ in range(2):
        codes = alphabet.nearest(weight / scale[:, None])
        power = (codes.square() * costs).sum(1)
        fitted = (codes * weight * costs).sum(1) / power.clamp(min=torch.finfo(power.dtype).tiny)
        consider(torch.where(fitted * scale > 0, fitted, scale))
    return scale.half()


@dataclass(frozen=True)
class Dial(Grid):
    """The step of weight (i, j) is step x U_jj / sqrt(F_i): where an error costs much it is small.

    Attributes:
        step: the root of what an error of one step costs; one for the whole model.
    """

    step: float
    ordered = True

    def __str__(self) -> str:
        return f"dial:{self.step:.4g}"

    def rounding(
        self, weight: Tensor, pivots: Tensor | None, masked: bool, prices: Tensor | None, largest: bool
    ) -> Rounding:
        assert pivots is not None and pivots.ndim == 1, "steps follow from a Hessian that all rows share"
        return _Dialled(self, weight, pivots, prices)


@final
class _Dialled(Rounding):
    def __init__(self, grid: Dial, weight: Tensor, pivots: Tensor, prices: Tensor | None) -> None:
        self.group, self.prices = weight.shape[1], prices
        self._codes = weight.new_zeros(weight.shape, dtype=torch.int16).T.contiguous()  # (in, out)
        columns = pivots.double()
        rows = grid.step / torch.ones_like(weight[:, 0], dtype=torch.float64)
        if prices is not None:
            rows = rows / prices.sqrt()  # infinite where an error costs nothing
        # beyond this a row is zero anyway, and smaller numbers are kinder to float16
        rows = torch.minimum(rows, FARTHEST_STEP * weight.abs().amax(1).double() / columns.min())
        rows = torch.where(rows > 0, rows, rows.max() if rows.max() > 0 else 1.0)
        self._rows, self._columns = as_factors(rows, columns)
        self._row, self._column = self._rows.to(weight.dtype), self._columns.to(weight.dtype)
        parts = zip(weight.split(MANY), self._row[:, None].split(MANY), strict=True)
        self._thrift = torch.cat([thrift_of(part / (row * self._column)) for part, row in parts])

    def reach(self, weight: Tensor, keep: Tensor, columns: slice) -> None:
        pass

    def round(self, weight: Tensor, keep: Tensor, column: int) -> Tensor:
        codes = self.nearest(weight / (self._row * self._column[column])).masked_fill(~keep, 0.0)
        self._codes[column] = codes.short()
        return codes * self._row * self._column[column]

    def nearest(self, values: Tensor, cost: float | Tensor = 1.0, rows: slice = ALL) -> Tensor:
        return thrifty(values, self._thrift[rows] / cost)

    def levels(self) -> Levels:
        codes = self._codes.T.contiguous()
        return Levels(codes, self._rows[:, None], self._columns, codes.shape[1], 0, True)


def thrift_of(values: Tensor) -> Tensor:
    """(out,): `THRIFT`, and 0 for rows of large values: there a smaller code hardly takes fewer bits.

    Args:
        values: (out, in), in units of their scales.
    """
    size = values.round().clamp(-MOST_CODE, MOST_CODE).abs().mean(1)
    return THRIFT * (size <= LARGE).to(values.dtype)


def thrifty(values: Tensor, thrift: float | Tensor) -> Tensor:
    """The codes of least (value - code)^2 + thrift x bits, a zero taking one bit and others 2 + |code|."""
    size = values.abs()
    codes = (size - 0.5 - thrift / 2).ceil().clamp(0, MOST_CODE)
    # the first level costs two bits more than zero
    codes = torch.where(size <= 0.5 + thrift, 0.0, codes.clamp(min=1.0)).to(values.dtype)
    return codes * values.sign()


Q4_0 = Uniform(4, 32, blocks=True)
"""ggml's Q4_0, as llama.cpp runs it: codes -8 to 7 and a scale for each 32 columns."""


def parse(text: str) -> Uniform:
    """The grid of "int2" to "int8", with ":GROUP" columns, or of "q4_0".

    Raises:
        ValueError: anything else, with what is allowed.
    """
    if text == str(Q4_0):
        return Q4_0
    match = re.fullmatch(r"int([2-8])(?::(\d+))?", text)
    if match and 2 <= (group := int(match[2] or GROUP)) <= MOST_CODE:
        return Uniform(int(match[1]), group)
    raise ValueError(
        f"grid is {text!r}; allowed: int2 to int8, with :GROUP columns that share a scale (by default "
        f"{GROUP}), e.g. int4 or int4:128; q4_0 (llama.cpp's)"
    )
