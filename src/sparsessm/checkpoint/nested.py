"""Nested bitmaps, in which files of version 2 hold codes of no fixed width: read, no longer written.

Part of coded.py. `docs/sparse-format.md` (kind "nested") says what the bytes are; newer files are entropy
coded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoding import GROUP, Bools

EMPTY, BY_EIGHTS, NESTED, MOST_FORM = 0, 1, 2, 9
"""How a row is stored: not at all, by eight columns, with 0 to 7 lowest bits apart."""
EIGHT = 8
MOST_CODE = 2**15 - 1

Arrays = Mapping[str, NDArray[Any]]


def decode(arrays: Arrays, shape: tuple[int, int]) -> NDArray[np.int16]:
    """The codes, of this shape.

    Args:
        arrays: "starts", "planes" and "forms".

    Raises:
        ValueError: bitmaps that do not end where they should, a code that is too large.
    """
    forms = forms_of(arrays, shape[0])
    groups = enumerate(range(0, shape[0], GROUP))
    return np.concatenate([_rows(arrays, group, forms[at : at + GROUP], shape[1]) for group, at in groups])


def forms_of(arrays: Arrays, rows: int) -> NDArray[np.int64]:
    """The form of each row, (rows,)."""
    held = arrays["forms"]
    return np.stack([held & 15, held >> 4], 1).reshape(-1)[:rows].astype(np.int64)


def wrong(arrays: Arrays, rows: int) -> Iterator[str]:
    """What is wrong with the bytes of arrays whose shapes are right, beside what `decode` finds."""
    starts, forms, most = arrays["starts"], forms_of(arrays, rows), len(arrays["planes"])
    if starts[0] != 0 or starts[-1] != most or (np.diff(starts) < 0).any():
        yield f"'starts' does not rise from 0 to the {most} bytes of 'planes'"
    if forms.max() > MOST_FORM:
        yield f"'forms' holds {forms.max()}; allowed: 0 to {MOST_FORM}"
    if rows % 2 and arrays["forms"][-1] > 15:
        yield "'forms' has bits set behind its last row"


def _rows(arrays: Arrays, group: int, forms: NDArray[np.int64], columns: int) -> NDArray[np.int16]:
    """The codes of a group of rows."""
    stream = arrays["planes"][int(arrays["starts"][group]) : int(arrays["starts"][group + 1])]
    bits, at, where = (
        np.unpackbits(stream, bitorder="little").view(np.bool_),
        0,
        f"rows {group * GROUP} and on",
    )

    def taken(many: int) -> Bools:
        nonlocal at
        if len(bits) - at < many:
            raise ValueError(f"'planes' ends inside of {where}")
        at += many
        return bits[at - many : at]

    live = np.zeros((len(forms), columns), np.bool_)
    for row, form in enumerate(forms):
        if form == BY_EIGHTS:
            inside = np.repeat(taken(-(-columns // EIGHT)), EIGHT)[:columns]
            live[row, inside] = taken(int(np.count_nonzero(inside)))
        elif form != EMPTY:
            live[row] = taken(columns)
    count = int(np.count_nonzero(live))
    negative, size, larger = taken(count), np.ones(count, np.int32), np.arange(count)
    while len(larger):
        larger = larger[taken(len(larger))]
        size[larger] += 1
    codes = np.zeros(live.shape, np.int32)
    codes[live] = np.where(negative, -size, size)
    for row, low in enumerate(forms - NESTED):
        if low > 0:
            rest = taken(columns * low).reshape(columns, low) @ (1 << np.arange(low))
            codes[row] = (codes[row] << low) + rest - (1 << low >> 1)
    if len(bits) - at >= 8 or bits[at:].any():
        raise ValueError(f"'planes' goes on behind {where}")
    if np.abs(codes).max(initial=0) > MOST_CODE:
        raise ValueError(f"a code above {MOST_CODE} in {where}")
    return codes.astype(np.int16)
