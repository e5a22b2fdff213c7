"""One tensor of a packed checkpoint: dense, as a bitmask or N:M, its values as they are or in int8.

`docs/sparse-format.md` defines what the arrays hold. This file turns a tensor into them, back into a tensor,
and says what is wrong with arrays that came from elsewhere. It knows no file and no model: `container.py`
stores what is made here, `packed.py` decides what is encoded how.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packed_tensor import STOCK, PackedTensor, chunks

GROUP = 16
"""Rows between two entries of a bitmask's `offsets`."""
LARGEST_M = 256
"""Largest M of N:M: a position in a group fits a byte."""
TRIED = ((2, 4), (4, 8))
"""The N:M that are tried where nothing says how a tensor was pruned."""
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_FEW = 1 << 18
_POPCOUNT = np.array([value.bit_count() for value in range(256)], np.uint8)

Bits = NDArray[np.signedinteger]
Bools = NDArray[np.bool_]


@final
@dataclass(frozen=True, eq=False)
class Encoded(PackedTensor):
    """A stock tensor, and the arrays that stand for it; [rows, cols] unless `kind` is "dense".

    Attributes:
        kind: "dense", "bitmask" or "n:m".
        values: in `dtype`, or int8 with `scale`; [kept] of a bitmask, [rows, cols/M*N] of N:M, else `shape`.
        removed: the value of the entries that are not stored, in the file `fill`.
        mask: uint8 [rows, ceil(cols/8)], bitmask only: bit j%8 of byte j//8 says that column j is kept.
        offsets: int64 [ceil(rows/16) + 1], bitmask only: where in `values` each group of 16 rows begins.
        index: uint8 [rows, ceil(cols/M*N*b/8)], N:M only: each value's position in its group, b bits each.
        scale: float32 [rows] with int8 values, which are then value * scale of the row.
        n, m: N values of every M consecutive columns; 0 unless `kind` is "n:m".
    """

    kind: str
    values: Tensor
    removed: float = 0.0
    mask: Tensor | None = None
    offsets: Tensor | None = None
    index: Tensor | None = None
    scale: Tensor | None = None
    n: int = 0
    m: int = 0

    @property
    def label(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "n:m" else self.kind

    @property
    def parts(self) -> dict[str, Tensor]:
        if self.kind == "dense" and self.scale is None:
            return {self.name: self.values}
        return {f"{self.name}.{part}": array for part, array in self._named() if array is not None}

    def _named(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from (("values", self.values), ("mask", self.mask), ("offsets", self.offsets))
        yield from (("index", self.index), ("scale", self.scale))

    @property
    def held(self) -> str:
        return _word(self.values.dtype)

    @property
    def fill(self) -> float | None:
        return None if self.kind == "dense" else self.removed

    @property
    def scaled(self) -> bool:
        return self.scale is not None

    @property
    def itself(self) -> Tensor | None:
        return self.values if self.kind == "dense" and self.scale is None else None

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        if self.kind == "dense":
            whole = self.values.clone()
        else:
            rows, columns = self.shape
            whole = torch.full((rows, columns), self.removed, dtype=self.values.dtype)
            into, values = bits_of(whole), bits_of(self.values)
            if self.kind == "bitmask":
                into[self._kept()] = values
            else:
                for part in chunks(*self.shape):
                    np.put_along_axis(into[part], self._columns(part), values[part], axis=1)
        if self.scale is not None:
            whole = whole.float() * self.scale[:, None]
        return whole.to(dtype or self.dtype)

    def bitmask(self) -> Encoded:
        """An N:M tensor as a bitmask with the same values, also those that equal the removed one; others as
        they are."""
        if self.kind != "n:m":
            return self
        rows, columns = self.shape
        kept = np.zeros((rows, columns), np.bool_)
        for part in chunks(*self.shape):
            np.put_along_axis(kept[part], self._columns(part), True, axis=1)
        mask, offsets = mask_of(kept)
        values = self.values.flatten().clone()
        return replace(self, kind="bitmask", values=values, mask=mask, offsets=offsets, index=None, n=0, m=0)

    def check(self, contents: bool = True) -> None:
        # Lazily: each statement may rely on all before it.
        for found in chain(self._form(), self._content() if contents else ()):
            raise ValueError(f"{self.name}: {found}")

    def _form(self) -> Iterator[str]:
        """What is wrong with kind, dtypes and shapes."""
        yield from self.own_form()
        if self.kind not in ("dense", "bitmask", "n:m"):
            yield f"its kind is {self.kind!r}; allowed: 'dense', 'bitmask', 'n:m'"
        if (self.kind != "dense" or self.scale is not None) and len(self.shape) != 2:
            way = "int8" if self.kind == "dense" else f"kind {self.kind}"
            yield f"{way} needs 2 axes, its shape is {list(self.shape)}"
        if not np.isfinite(self.removed) or float(torch.tensor(self.removed).to(self.dtype)) != self.removed:
            allowed = f"a finite number that {_word(self.dtype)} has"
            yield f"its removed value is {self.removed!r}; allowed: {allowed}"
        if self.removed != 0 and (self.kind == "dense" or self.scale is not None):
            yield f"its removed value is {self.removed!r}; a dense or int8 tensor has none but 0"
        if self.kind == "n:m":
            if not 0 < self.n < self.m <= LARGEST_M:
                yield f"its kind is '{self.label}'; allowed: N:M with 0 < N < M <= {LARGEST_M}"
            if self.shape[1] % self.m:
                yield f"its kind is '{self.label}', but {self.m} does not divide its {self.shape[1]} columns"
        held = self.dtype if self.scale is None else torch.int8
        expected = {"values": (held, self._lengths())}
        if self.kind == "bitmask":
            rows, columns = self.shape
            expected["mask"] = (torch.uint8, (rows, -(-columns // 8)))
            expected["offsets"] = (torch.int64, (-(-rows // GROUP) + 1,))
        elif self.kind == "n:m":
            rows, columns = self.shape
            expected["index"] = (torch.uint8, (rows, -(-columns // self.m * self.n * _width(self.m) // 8)))
        if self.scale is not None:
            expected["scale"] = (torch.float32, (self.shape[0],))
        for part, array in self._named():
            wanted = expected.get(part)
            if array is None or wanted is None:
                if array is not wanted:
                    yield f"it {'lacks' if array is None else 'has'} '{part}', kind {self.label}"
            elif array.dtype != wanted[0] or tuple(array.shape) != wanted[1]:
                found = f"{_word(array.dtype)} {list(array.shape)}"
                yield f"'{part}' is {found}, expected {_word(wanted[0])} {list(wanted[1])}"

    def _lengths(self) -> tuple[int, ...]:
        """The shape that `values` must have."""
        if self.kind == "bitmask":
            return (min(self.values.numel(), prod(self.shape)),)
        return (self.shape[0], self.shape[1] // self.m * self.n) if self.kind == "n:m" else self.shape

    def _content(self) -> Iterator[str]:
        """What is wrong with the bytes of arrays whose shapes are right."""
        if self.scale is None:
            if not finite(self.values):
                yield "'values' holds NaN or Inf; allowed: finite numbers"
        else:
            if (self.values == -128).any():
                yield "'values' holds -128; allowed: -127 to 127"
            wrong = ~torch.isfinite((self.scale * 127).to(self.dtype)) | (self.scale < 0)
            if wrong.any():
                allowed = f"finite numbers >= 0 whose 127-fold is finite in {_word(self.dtype)}"
                yield f"'scale' holds {float(self.scale[wrong][0])}; allowed: {allowed}"
        if self.mask is not None and self.offsets is not None:
            yield from self._mask_content(self.mask.numpy(), self.offsets)
        if self.index is not None:
            yield from self._index_content(self.index.numpy())

    def _mask_content(self, mask: NDArray[np.uint8], offsets: Tensor) -> Iterator[str]:
        yield from bits_above(mask, self.shape[1])
        counted = starts_of(_POPCOUNT[mask].sum(axis=1, dtype=np.int64))
        if not torch.equal(counted, offsets):
            at = int((counted != offsets).nonzero()[0])
            yield f"'offsets'[{at}] is {int(offsets[at])}, but the mask has {int(counted[at])} bits before it"
        if int(counted[-1]) != self.values.numel():
            yield f"'mask' keeps {int(counted[-1])} entries, but there are {self.values.numel()} values"

    def _index_content(self, index: NDArray[np.uint8]) -> Iterator[str]:
        used = self.values.shape[1] * _width(self.m)
        if used % 8 and (index[:, -1] >> used % 8).any():
            yield "'index' has bits set behind its last position; allowed: zeros"
        for part in chunks(*self.shape):
            positions = self._positions(part).reshape(-1, self.n)
            if (positions >= self.m).any():
                yield f"'index' holds position {int(positions.max())}; allowed: 0 to {self.m - 1}"
            if (positions[:, 1:] <= positions[:, :-1]).any():
                yield f"'index' positions of a group are not strictly increasing (rows {part.start} and on)"

    def _kept(self) -> Bools:
        """A bitmask, bool [rows, cols]."""
        assert self.mask is not None
        return np.unpackbits(self.mask.numpy(), axis=1, count=self.shape[1], bitorder="little").view(np.bool_)

    def _positions(self, part: slice) -> NDArray[np.uint8]:
        """N:M: the position in its group of each value of some rows, uint8 [rows, cols/M*N]."""
        assert self.index is not None
        width, count = _width(self.m), self.shape[1] // self.m * self.n
        bits = np.unpackbits(self.index.numpy()[part], axis=1, count=count * width, bitorder="little")
        bits = bits.reshape(-1, count, width)
        total = np.zeros(bits.shape[:2], np.uint8)
        for place in range(width):
            total |= bits[:, :, place] << place
        return total

    def _columns(self, part: slice) -> NDArray[np.int64]:
        """N:M: the column of each value of some rows, int64 [rows, cols/M*N]."""
        first = np.repeat(np.arange(self.shape[1] // self.m, dtype=np.int64) * self.m, self.n)
        return self._positions(part) + first


def encode(
    name: str,
    tensor: Tensor,
    *,
    int8: bool = False,
    patterns: Iterable[tuple[int, int]] = TRIED,
    removed: Iterable[float] = (0.0,),
    kind: str | None = None,
) -> Encoded:
    """The encoding of a tensor that takes the fewest bytes; of equals the first of dense, N:M, bitmask.

    Lossless unless `int8`. An entry is left out only if its bits are those of a removed value: -0.0 is kept.

    Args:
        name: of the stock tensor.
        tensor: in its stock dtype, any shape; only one of 2 axes can be other than dense.
        int8: values to int8 with one scale a row, the row's largest magnitude / 127.
        patterns: the N:M that are tried; one fits if every group has at most N entries that are not removed.
        removed: the values that removed entries may have; int8 has only 0.
        kind: "dense", "bitmask" or "N:M" to take no other.

    Raises:
        ValueError: begins with the name: a dtype that is not stock, NaN or Inf, or `kind` does not fit.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in STOCK.values():
        raise ValueError(f"{name}: its dtype is {_word(tensor.dtype)}; allowed: {', '.join(STOCK)}")
    if not finite(tensor):
        raise ValueError(f"{name}: NaN or Inf; allowed: finite numbers")
    shape, scale, held = tuple(tensor.shape), None, tensor
    if tensor.ndim != 2 and (int8 or kind not in (None, "dense")):
        raise ValueError(f"{name}: {'int8' if int8 else kind} needs 2 axes, its shape is {list(shape)}")
    if int8:
        held, scale = _quantised(tensor)
        removed = (0.0,)
    plain = Encoded(name, shape, tensor.dtype, "dense", held, scale=scale)
    if tensor.ndim != 2 or kind == "dense":
        plain.check(contents=False)
        return plain
    if kind and ":" in kind:
        n, _, m = kind.partition(":")
        patterns = ((int(n), int(m)),)
    ways = [(plain.nbytes, 0, plain)]
    rows, columns = shape
    bits, row_scale = bits_of(held), 0 if scale is None else scale.nbytes
    for value in removed:
        kept = bits != bits_of(torch.tensor([value], dtype=held.dtype))[0]
        count = int(np.count_nonzero(kept))
        size = rows * -(-columns // 8) + 8 * (-(-rows // GROUP) + 1) + count * held.itemsize + row_scale
        ways.append((size, 2, replace(plain, kind="bitmask", removed=value)))
        for n, m in patterns:
            if 0 < n < m <= LARGEST_M and columns % m == 0 and count <= rows * columns // m * n:
                entries = columns // m * n
                size = rows * (entries * held.itemsize - (-entries * _width(m) // 8)) + row_scale
                ways.append((size, 1, replace(plain, kind="n:m", removed=value, n=n, m=m)))
    for _, _, way in sorted(ways, key=lambda way: way[:2]):
        if kind not in (None, way.label):
            continue
        found = _filled(way, bits)
        if found is not None:
            found.check(contents=False)
            return found
    raise ValueError(f"{name}: does not fit kind {kind!r}")


def _filled(way: Encoded, bits: Bits) -> Encoded | None:
    """An encoding that was chosen by its size, with its arrays; None if an N:M does not fit.

    Args:
        way: its values are those of the whole tensor. bits: the same as integers.
    """
    if way.kind == "dense":
        return way
    removed = bits_of(torch.tensor([way.removed], dtype=way.values.dtype))[0]
    if way.kind == "bitmask":
        kept = bits != removed
        mask, offsets = mask_of(kept)
        values = torch.from_numpy(bits[kept]).view(way.values.dtype)
        return replace(way, values=values, mask=mask, offsets=offsets)
    rows, columns = way.shape
    entries, width = columns // way.m * way.n, _width(way.m)
    values = np.empty((rows, entries), bits.dtype)
    index = np.empty((rows, -(-entries * width // 8)), np.uint8)
    places = np.arange(way.m, dtype=np.uint8)
    for part in chunks(rows, columns):
        groups = bits[part].reshape(-1, way.m)
        kept = groups != removed
        room = way.n - kept.sum(axis=1, dtype=np.int16, keepdims=True)
        if (room < 0).any():
            return None
        if room.any():  # explicit removed values complete the group, those with the lowest positions
            kept |= np.cumsum(~kept, axis=1, dtype=np.int16) <= room
        values[part] = groups[kept].reshape(-1, entries)
        positions = np.broadcast_to(places, kept.shape)[kept].reshape(-1, entries, 1)
        spread = positions >> np.arange(width, dtype=np.uint8) & 1
        index[part] = np.packbits(spread.reshape(-1, entries * width), axis=1, bitorder="little")
    held = torch.from_numpy(values).view(way.values.dtype)
    return replace(way, values=held, index=torch.from_numpy(index))


def _quantised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values [rows, cols], float32 scale [rows]) of a matrix: nearest, ties to even."""
    values = torch.empty(tensor.shape, dtype=torch.int8)
    scale = torch.empty(len(tensor))
    for part in chunks(*tensor.shape):
        whole = tensor[part].float()
        step = whole.abs().amax(1) / 127
        over = ~torch.isfinite((step * 127).to(tensor.dtype))  # by rounding, next to the largest number
        scale[part] = step = torch.where(over, step * (1 - 2**-8), step)
        step = step[:, None]
        steps = (whole / step).nan_to_num(0).round().clamp(-127, 127)  # 0/0: a row of zeros
        values[part] = torch.where(step > 0, steps, 0).to(torch.int8)
    return values, scale


def mask_of(kept: Bools) -> tuple[Tensor, Tensor]:
    """(mask, offsets) of a bool [rows, cols]."""
    mask = torch.from_numpy(np.packbits(kept, axis=1, bitorder="little"))
    return mask, starts_of(np.count_nonzero(kept, axis=1))


def starts_of(counts: NDArray[np.integer]) -> Tensor:
    """Where the values of each group of rows begin, and their number, from the number in each row."""
    groups = np.add.reduceat(counts, np.arange(0, len(counts), GROUP), dtype=np.int64)
    return torch.from_numpy(np.concatenate(([0], np.cumsum(groups))))


def bits_above(mask: NDArray[np.uint8], columns: int) -> Iterator[str]:
    """What is wrong with a mask whose last bytes have bits set behind the last column."""
    rest = columns % 8
    if rest and (mask[:, -1] >> rest).any():
        row = int(np.flatnonzero(mask[:, -1] >> rest)[0])
        yield f"'mask' has bits set behind column {columns - 1} in row {row}; allowed: zeros"


def finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype not in _BITS:
        return bool(torch.isfinite(flat).all())
    # In integers, and so many as the cache holds: torch takes fifty times as long for narrow floats.
    bits, infinite = bits_of(flat), bits_of(torch.tensor([torch.inf], dtype=flat.dtype))[0]
    parts = (bits[at : at + _FEW] for at in range(0, len(bits), _FEW))
    return all(bool((part & np.iinfo(bits.dtype).max).max() < infinite) for part in parts)


def bits_of(tensor: Tensor) -> Bits:
    """The same memory as integers: numpy has no bfloat16, and -0.0 equals 0.0 in every other view."""
    return tensor.view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()


def _width(m: int) -> int:
    """Bits of a position in a group of m."""
    return (m - 1).bit_length()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
