"""Stage 4, what is left of a matrix on a grid: codes and scales, small exact data of which a file holds every
bit.

Codes of a fixed width, with or without a bitmap of what is not zero, or nested bitmaps, in which small codes
take few bits. Formulas in docs/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_LOW = 7  # lowest bits of a row that lie apart, at most
SPARSE = 8  # columns that share a bit in a row of few values
# How a row of nested bitmaps is stored: not at all, by eights, or with 0 to `MOST_LOW` lowest bits apart.
EMPTY, BY_EIGHTS, NESTED = 0, 1, 2
FORM_BITS = 4  # that say which it is, of each row
SCALE_BITS = 16  # of a group's scale, a float16
FACTOR_BITS = 8  # of a row's and a column's factor: a float16 without sign and with 3 bits of fraction
MOST_CODE = 2**15 - 1


@dataclass(frozen=True)
class Levels:
    """A matrix on a grid: codes, and the scales that turn them into values.

    value = (float32(code) * float32(row scale)) * float32(column scale), products in float32 in this order;
    the second only where columns have scales.

    Attributes:
        codes: (out, in) int16. rows: (out, groups) float16, the scale of each row in every `group` columns.
        columns: (in,) float16; None: columns have no scales. With them all scales are factors: their lowest
            seven bits are zero, and a file holds bits 7 to 14.
        group: columns that a row's scale is for; the last group may be shorter.
        width: bits of a code: they have a fixed width. 0: nested bitmaps, see `nested_bits`.
        masked: a bitmap says what is zero, and zeros take no code of fixed width.
    """

    codes: Tensor
    rows: Tensor
    columns: Tensor | None
    group: int
    width: int
    masked: bool

    def reordered(self, order: Tensor) -> Levels:
        """With the columns in another order; only where each has a scale of its own."""
        assert self.columns is not None, "groups are of neighbours"
        return replace(self, codes=self.codes[:, order], columns=self.columns[order])

    def values(self) -> Tensor:
        """(out, in) float32, bit for bit what a reader of the file gets."""
        values = self.codes.float() * self._by_row()
        return values if self.columns is None else values * self.columns.float()

    def scales(self) -> Tensor:
        """(out, in) or (out, 1) float32: what one step of the code is worth."""
        return self._by_row() if self.columns is None else self._by_row() * self.columns.float()

    def _by_row(self) -> Tensor:
        """(out, in) or (out, 1) float32: the row's scale of each entry."""
        rows = self.rows.float()
        if rows.shape[1] == 1:
            return rows
        return rows.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]

    @property
    def keep(self) -> Tensor:
        """(out, in) bool: what a bitmap says is not zero; all, where there is none."""
        return self.codes != 0 if self.masked else torch.ones_like(self.codes, dtype=torch.bool)

    @property
    def forms(self) -> Tensor:
        """(out,) int64: how each row of nested bitmaps is stored: in the form of `nested_bits` that takes the
        fewest bits, the first of several."""
        return nested_bits(self.codes).min(1).indices

    @property
    def side_bits(self) -> int:
        """Of scales and forms."""
        if self.columns is None:
            return SCALE_BITS * self.rows.numel()
        return factor_bits(*self.codes.shape)

    @property
    def bits(self) -> int:
        """That are stored for the matrix: codes, masks, scales, everything."""
        entries = self.codes.numel()
        if not self.width:
            return self.side_bits + int(nested_bits(self.codes).amin(1).sum())
        if not self.masked:
            return self.side_bits + self.width * entries
        return self.side_bits + entries + self.width * int(self.codes.count_nonzero())

    @property
    def entropy(self) -> float:
        """Bits of the codes under an ideal code that knows how often each is in a row, and of the rest."""
        rows = torch.arange(len(self.codes), device=self.codes.device)[:, None]
        counts = (self.codes + (rows << 16)).unique(return_counts=True)[1].double()
        return float(-(counts * (counts / self.codes.shape[1]).log2()).sum()) + self.side_bits


def factor_bits(rows: int, columns: int) -> int:
    """Of a matrix on the dial beside its codes: factors, and the forms of its rows."""
    return FACTOR_BITS * (rows + columns) + FORM_BITS * rows


def nested_bits(codes: Tensor) -> Tensor:
    """Bits of every row as nested bitmaps, in every form.

    Nested bitmaps of integers h: of all a bitmap of what is not zero; of these the signs, and a bitmap of
    |h| > 1; of those a bitmap of |h| > 2, and so on: one bit for a zero, 2 + |h| for all else. A row that is
    zero is not stored. In a row of few values a first bitmap says which eight columns have any, and only of
    these the others tell. In a row of large values the lowest bits lie apart, as in a Rice code: z = 2^low h
    + rest, rest + 2^(low - 1) has `low` bits, and h is nested.

    Args:
        codes: (out, in), integers.

    Returns:
        (out, NESTED + MOST_LOW + 1) int64, in the order of the forms.
    """
    codes = codes.int()
    columns, live = codes.shape[1], codes != 0
    none = torch.where(live.any(1), 1 << 62, 0)
    eights = F.pad(live, (0, -columns % SPARSE)).unflatten(1, (-1, SPARSE)).any(2)
    inside = eights.repeat_interleave(SPARSE, 1)[:, :columns].sum(1)
    bits = [none, eights.shape[1] + inside + codes.abs().sum(1) + live.sum(1)]
    for low in range(MOST_LOW + 1):
        high = ((codes + (1 << low >> 1)) >> low).abs()
        bits.append((1 + low) * columns + high.sum(1) + high.count_nonzero(1))
    return torch.stack(bits, 1)


def as_scales(scales: Tensor) -> Tensor:
    """Positive float16 scales as near as there are; 1 where nothing asks for any."""
    limits = torch.finfo(torch.float16)
    return torch.where(scales > 0, scales.clamp(limits.tiny, limits.max), 1.0).half()


def as_factors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (out,), (in,), float16 of `FACTOR_BITS`, near to these positive ones up to a power of two,
    which goes from the one to the other: the smallest of both are then equally far above the smallest
    float16.
    """
    shift = math.floor((math.log2(float(columns.min())) - math.log2(float(rows.min()))) / 2)
    return _coarse(rows * 2.0**shift), _coarse(columns * 2.0**-shift)


def _coarse(factors: Tensor) -> Tensor:
    """To the nearest float16 whose lowest seven bits are zero."""
    bits = as_scales(factors.clamp(max=2.0**15)).view(torch.int16)
    return ((bits + 64) >> 7 << 7).view(torch.float16)
