"""One tensor of a packed checkpoint on a grid: integer codes of few bits, and scales of 16 bits.

`docs/sparse-format.md` defines what the arrays hold, methods/grids.py where codes and scales come from. Codes
have a fixed width, with or without a mask that says what is zero, or are entropy coded (kernels/entropy.py);
older files have nested bitmaps instead (`nested.py`). Beside `encoding.py`, and like it, this file knows no
file and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import entropy
from . import nested
from .encoding import GROUP, Bools, Encoded, bits_above, encode, mask_of, starts_of
from .packed_tensor import PackedTensor, chunks

_OLDER = r"nested|(?:int|odd|masked)[2-8]:[1-9]\d{0,4}"
OLDER, KIND = re.compile(_OLDER, re.ASCII), re.compile(f"ans|{_OLDER}", re.ASCII)
"""Labels of the kinds that are coded: in version 2 of the format, and all."""
OLDER_WORDS = "'intB:G', 'oddB:G', 'maskedB:G' (codes of 2 to 8 bits, a scale for G columns), 'nested'"
WORDS = f"{OLDER_WORDS}, 'ans'"
PARTS = {
    "int": ("codes", "scales"),
    "odd": ("codes", "scales"),
    "masked": ("mask", "offsets", "codes", "scales"),
    "nested": ("starts", "planes", "forms", "rows", "columns"),
    "ans": ("ends", "stream", "classes", "tables", "rows", "columns"),
}
"""Arrays of a kind, in the order in which the checksum takes them."""
UNSTORED = 7
"""Bits of a factor's float16 that are zero and not stored."""

Codes = NDArray[np.int16]


def split(label: str) -> tuple[str, int, int]:
    """Kind, bits of a code and columns of a scale, of a label that fits `KIND`."""
    kind, width, group = re.fullmatch(r"([a-z]+)(\d?):?(\d*)", label).groups()  # type: ignore[union-attr]
    return kind, int(width or 0), int(group or 0)


@final
@dataclass(frozen=True, eq=False)
class Coded(PackedTensor):
    """A matrix, and the arrays that stand for its codes and scales.

    value = (float32(code) * float32(row scale)) * float32(column scale), float32 products in this order; the
    second only where columns have factors.

    Attributes:
        kind: "int" or "odd": a code for every entry; "masked": for every entry that a mask keeps; "ans",
            "nested": codes of no fixed width, with factors of rows and columns.
        width: bits of a code. group: columns of a scale. Both 0 without a fixed width.
        arrays: by the names of `PARTS`.
    """

    kind: str
    width: int
    group: int
    arrays: dict[str, Tensor]

    @property
    def label(self) -> str:
        return self.kind if not self.width else f"{self.kind}{self.width}:{self.group}"

    @property
    def parts(self) -> dict[str, Tensor]:
        return {f"{self.name}.{part}": self.arrays[part] for part in PARTS[self.kind] if part in self.arrays}

    @property
    def held(self) -> str:
        return "codes"

    @property
    def fill(self) -> float | None:
        return None

    @property
    def scaled(self) -> bool:
        return True

    @property
    def itself(self) -> Tensor | None:
        return None

    def codes(self) -> Codes:
        """The codes, [rows, cols]; 0 where a mask keeps nothing.

        Raises:
            ValueError: a stream or nested bitmaps that do not end where they should; begins with the name.
        """
        rows, columns = self.shape
        if not self.width:
            decode = entropy.decode if self.kind == "ans" else nested.decode
            try:
                return decode({part: array.numpy() for part, array in self.arrays.items()}, (rows, columns))
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        held = self.arrays["codes"].numpy()
        if self.kind == "masked":
            kept, whole = self.kept(), np.zeros(self.shape, np.int16)
            found = _unpacked(held, int(np.count_nonzero(kept)), self.width).astype(np.int16)
            below = 1 << self.width - 1
            whole[kept] = found - below + (found >= below)
            return whole
        whole = np.empty(self.shape, np.int16)
        for part in chunks(rows, columns):
            found = _unpacked(held[part], columns, self.width).astype(np.int16)
            whole[part] = (
                2 * found - (1 << self.width) + 1 if self.kind == "odd" else found - (1 << self.width - 1)
            )
        return whole

    def kept(self) -> Bools:
        """What the mask keeps, bool [rows, cols]."""
        mask = self.arrays["mask"].numpy()
        return np.unpackbits(mask, axis=1, count=self.shape[1], bitorder="little").view(np.bool_)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        codes, columns = torch.from_numpy(self.codes()), self.shape[1]
        if not self.width:
            values = codes.float() * self.factors("rows")[:, None] * self.factors("columns")
        else:
            scales = self.arrays["scales"].float().repeat_interleave(self.group, 1)[:, :columns]
            values = codes.float() * scales
        if self.kind == "masked":
            values += 0.0  # what is not kept is 0, not -0
        return values.to(dtype or self.dtype)

    def check(self, contents: bool = True) -> None:
        for found in self._form():
            raise ValueError(f"{self.name}: {found}")
        if contents:
            for found in self._content():
                raise ValueError(f"{self.name}: {found}")

    def factors(self, part: str) -> Tensor:
        """The factors of its "rows" or "columns", float32."""
        return (self.arrays[part].short() << UNSTORED).view(torch.float16).float()

    def _form(self) -> Iterator[str]:
        """What is wrong with kind, dtypes and shapes."""
        yield from self.own_form()
        if not KIND.fullmatch(self.label) or self.kind not in PARTS:
            yield f"its kind is {self.label!r}; allowed: int, odd or masked with BITS:GROUP, nested, ans"
        if len(self.shape) != 2:
            yield f"kind {self.label} needs 2 axes, its shape is {list(self.shape)}"
        rows, columns = self.shape
        groups, half = -(-rows // GROUP), torch.float16
        entries = self.arrays["codes"].numel() if "codes" in self.arrays else 0
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "mask": (torch.uint8, (rows, -(-columns // 8))),
            "offsets": (torch.int64, (groups + 1,)),
            "starts": (torch.int64, (groups + 1,)),
            "ends": (torch.int64, (-(-rows // entropy.together(columns)),)),
            "codes": (
                torch.uint8,
                (entries,) if self.kind == "masked" else (rows, -(-columns * self.width // 8)),
            ),
            "scales": (half, (rows, -(-columns // max(self.group, 1)))),
            "forms": (torch.uint8, (-(-rows // 2),)),
            "rows": (torch.uint8, (rows,)),
            "columns": (torch.uint8, (columns,)),
        }
        for part in ("planes", "stream", "classes", "tables"):  # what they hold says how much that is
            if part in self.arrays:
                expected[part] = (torch.uint8, (self.arrays[part].numel(),))
        if self.arrays.keys() != set(PARTS[self.kind]):
            yield f"kind {self.label} has the arrays {', '.join(PARTS[self.kind])}, not {sorted(self.arrays)}"
        for part, array in self.arrays.items():
            if (array.dtype, tuple(array.shape)) != expected[part]:
                dtype, shape = expected[part]
                yield f"'{part}' is {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"

    def _content(self) -> Iterator[str]:
        """What is wrong with the bytes of arrays whose shapes are right."""
        factors = {part: self.factors(part) for part in ("rows", "columns")} if not self.width else {}
        scales = factors or {"scales": self.arrays["scales"]}
        signed = self.kind in ("int", "masked")
        for part, found in scales.items():
            there = found != 0 if signed else found > 0
            if not bool((torch.isfinite(found) & there).all()):
                yield f"'{part}' holds what is not a {'number other than 0' if signed else 'positive number'}"
        if "mask" in self.arrays:
            yield from bits_above(self.arrays["mask"].numpy(), self.shape[1])
        if self.kind == "masked":
            counted = starts_of(np.count_nonzero(self.kept(), axis=1))
            if not torch.equal(counted, self.arrays["offsets"]):
                yield "'offsets' does not count the bits of the mask"
            entries, held = int(counted[-1]), self.arrays["codes"].numpy()
            if held.size != -(-entries * self.width // 8):
                yield f"'codes' has {held.size} bytes for {entries} entries of {self.width} bits"
            if entries * self.width % 8 and held[-1] >> entries * self.width % 8:
                yield "'codes' has bits set behind its last entry"
        elif self.kind == "nested":
            held = {part: array.numpy() for part, array in self.arrays.items()}
            yield from nested.wrong(held, self.shape[0])
        elif (
            self.shape[1] * self.width % 8
            and (self.arrays["codes"][:, -1].numpy() >> self.shape[1] * self.width % 8).any()
        ):
            yield "'codes' has bits set behind its last column"
        if not bool(torch.isfinite(self.decode()).all()):
            yield f"a value is beyond {self.dtype}"


def plain(tensor: PackedTensor) -> Encoded:
    """The same with values of its own, codes in the stock dtype."""
    return tensor if isinstance(tensor, Encoded) else encode(tensor.name, tensor.decode())


class OnGrid(Protocol):
    """A matrix on a grid, as methods/levels.py has it (`CodedLevels`); see there."""

    @property
    def arrays(self) -> Mapping[str, Tensor]: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def columns(self) -> Tensor | None: ...
    @property
    def group(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def masked(self) -> bool: ...
    def codes(self) -> Tensor: ...


def code(name: str, dtype: torch.dtype, found: OnGrid) -> Coded:
    """A matrix on a grid as it is stored, not one bit of it lost.

    Args:
        name, dtype: of the stock tensor.

    Raises:
        ValueError: as `fixed` and `ans`.
    """
    if found.columns is not None:
        return ans(name, dtype, found.arrays, found.rows[:, 0], found.columns)
    how: dict[str, Any] = {"width": found.width, "group": found.group, "masked": found.masked}
    return fixed(name, dtype, found.codes(), found.rows, **how)


def fixed(
    name: str, dtype: torch.dtype, codes: Tensor, scales: Tensor, *, width: int, group: int, masked: bool
) -> Coded:
    """A matrix of codes of one width.

    Args:
        name, dtype: of the stock tensor. codes: (rows, cols) integers. scales: (rows, groups) float16.
        masked: zeros are what a mask removes: all other codes are within 1 and 2^(width - 1), or their
            negatives. Without, codes are all odd and within 2^width - 1, or from -2^(width - 1) to
            2^(width - 1) - 1.

    Raises:
        ValueError: a code that the width does not have, or what `Coded.check` refuses; begins with the name.
    """
    rows, columns = codes.shape
    held, arrays = codes.numpy().astype(np.int32), {"scales": scales.half().contiguous()}
    below = 1 << width - 1
    if masked:
        kind, kept = "masked", held != 0
        arrays["mask"], arrays["offsets"] = mask_of(kept)
        found = held[kept]
        found = found + below - (found > 0)
        packed = _packed(found[None], width)[0]
    else:
        kind = "odd" if (held % 2 == 1).all() else "int"
        found = (held + 2 * below - 1) // 2 if kind == "odd" else held + below
        packed = np.concatenate([_packed(found[part], width) for part in chunks(rows, columns)])
    if found.size and not 0 <= found.min() <= found.max() < 2 * below:
        raise ValueError(f"{name}: a code that {width} bits do not have")
    arrays["codes"] = torch.from_numpy(packed)
    coded = Coded(name, (rows, columns), dtype, kind, width, group, arrays)
    coded.check(contents=False)
    return coded


def ans(name: str, dtype: torch.dtype, arrays: Mapping[str, Tensor], rows: Tensor, columns: Tensor) -> Coded:
    """A matrix of codes of no fixed width, entropy coded.

    Args:
        name, dtype: of the stock tensor. arrays: of `entropy.encode`, which are not copied.
        rows, columns: float16 factors whose lowest `UNSTORED` bits are zero.

    Raises:
        ValueError: a factor of more bits, or as `Coded.check`; begins with the name.
    """
    arrays = dict(arrays)
    for part, values in (("rows", rows), ("columns", columns)):
        bits = values.half().contiguous().view(torch.int16)
        if bool((bits & (1 << UNSTORED) - 1).any()):
            raise ValueError(f"{name}: a factor of its {part} has more bits than are stored")
        arrays[part] = (bits >> UNSTORED).to(torch.uint8)
    coded = Coded(name, (len(rows), len(columns)), dtype, "ans", 0, 0, arrays)
    coded.check(contents=False)
    return coded


def _packed(found: NDArray[np.int32], width: int) -> NDArray[np.uint8]:
    """Numbers [rows, entries] from 0 to 2^width - 1 -> their bits, lowest first, each row in whole bytes."""
    bits = (found[:, :, None] >> np.arange(width) & 1).astype(np.uint8)
    return np.packbits(bits.reshape(len(found), -1), axis=1, bitorder="little")


def _unpacked(held: NDArray[np.uint8], count: int, width: int) -> NDArray[np.int32]:
    """The reverse of `_packed`: [..., bytes] -> [..., count]."""
    bits = np.unpackbits(held, axis=-1, count=count * width, bitorder="little")
    return bits.reshape(*held.shape[:-1], count, width) @ (1 << np.arange(width, dtype=np.int32))
