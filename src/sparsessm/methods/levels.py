"""Stage 4, what is left of a matrix on a grid: codes and scales, small exact data of which a file holds every
bit.

Codes of a fixed width, with or without a bitmap of what is not zero, or entropy coded (kernels/entropy.py).
Formulas in docs/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsessm.kernels import entropy

CLASS_BITS = 4  # of a row, that say which tables of frequencies it has
MORE = 0.01  # bits of a code that tables, states and roundings take
SCALE_BITS = 16  # of a group's scale, a float16
FACTOR_BITS = 8  # of a row's and a column's factor: a float16 without sign and with 3 bits of fraction
MOST_CODE = entropy.MOST_CODE
_MOST = 1 << 22  # counts and codes that are looked at together


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
        width: bits of a code: they have a fixed width. 0: entropy coded.
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
        values = self.codes.to(torch.float32, copy=True).mul_(self._by_row())
        if self.masked:
            values += 0.0  # what is not kept is 0, not -0
        return values if self.columns is None else values.mul_(self.columns.float())

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
    def side_bits(self) -> int:
        """Of scales."""
        if self.columns is None:
            return SCALE_BITS * self.rows.numel()
        return factor_bits(*self.codes.shape)

    def coded(self) -> CodedLevels:
        """The same in as little memory as there is."""
        found = entropy.encode(self.codes.cpu().numpy())
        arrays = {part: torch.from_numpy(array) for part, array in found.items()}
        if self.width:
            kept = self.codes.numel() + self.width * int(self.codes.count_nonzero())
            bits = kept if self.masked else self.width * self.codes.numel()
        else:
            bits = 8 * sum(array.nbytes for array in arrays.values())
        how = self.codes.shape[1], self.group, self.width, self.masked, self.side_bits + bits
        columns = None if self.columns is None else self.columns.cpu()
        return CodedLevels(arrays, self.rows.cpu(), columns, *how)

    @property
    def entropy(self) -> float:
        """Bits of the codes under an ideal code that knows how often each is in a row, and of the rest."""
        return float(_ideal(self.codes)[0].sum()) + self.side_bits


@dataclass(frozen=True)
class CodedLevels:
    """A matrix on a grid as a run keeps it until it is written: codes of all matrices are too much for the
    memory. Codes without a fixed width are written as they are here, and are coded once.

    Attributes:
        arrays: of `kernels.entropy.encode`, of the codes. inputs: columns of the matrix.
        rows, columns, group, width, masked: as of `Levels`.
        bits: that are stored for the matrix: codes, masks, scales, everything.
    """

    arrays: dict[str, Tensor]
    rows: Tensor
    columns: Tensor | None
    inputs: int
    group: int
    width: int
    masked: bool
    bits: int

    def codes(self) -> Tensor:
        """(out, in) int16."""
        found = {part: array.numpy() for part, array in self.arrays.items()}
        return torch.from_numpy(entropy.decode(found, (len(self.rows), self.inputs)))

    def levels(self) -> Levels:
        """With the codes, and thus the values, at hand."""
        return Levels(self.codes(), self.rows, self.columns, self.group, self.width, self.masked)


def factor_bits(rows: int, columns: int) -> int:
    """Of a matrix on the dial beside its codes."""
    return FACTOR_BITS * (rows + columns)


def coded_bits(codes: Tensor) -> int:
    """Bits that codes (out, in) take in a file, entropy coded, everything counted."""
    return entropy.size(codes.short().cpu().numpy())


def row_bits(codes: Tensor) -> Tensor:
    """About the bits that each row takes, entropy coded, if columns are alike.

    Those of an ideal code that knows the row's histogram; as a code does not, half a bit times log2(e) for
    each number of the row but one (Miller and Madow's correction of an entropy); and what a class and the
    tables take.

    Args:
        codes: (out, in), integers.

    Returns:
        (out,) float64.
    """
    ideal, kinds = _ideal(codes)
    return ideal + (kinds - 1) / (2 * math.log(2)) + CLASS_BITS + MORE * codes.shape[1]


def _ideal(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the bits under a code that knows its histogram, and how many numbers it has: float64."""
    columns, found = codes.shape[1], []
    most = int(codes.abs().max())
    width = 2 * most + 1
    known = torch.arange(columns + 1, dtype=torch.float64, device=codes.device)
    known = torch.special.xlogy(known, known)  # of every count that there can be
    for part in codes.long().split(max(1, _MOST // max(width, columns))):
        first = width * torch.arange(len(part), device=codes.device)[:, None] + most
        counts = torch.bincount((part + first).flatten(), minlength=len(part) * width).view(-1, width)
        bits = columns * math.log2(columns) - known[counts].sum(1) / math.log(2)
        found.append((bits, (counts > 0).sum(1).double()))
    bits, kinds = zip(*found, strict=True)
    return torch.cat(bits), torch.cat(kinds)


def as_scales(scales: Tensor) -> Tensor:
    """Float16 scales other than 0, as near as there are, with the same sign; 1 where nothing asks for any."""
    limits, size = torch.finfo(torch.float16), scales.abs()
    return torch.where(size > 0, size.clamp(limits.tiny, limits.max) * scales.sign(), 1.0).half()


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
