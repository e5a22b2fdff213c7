"""The writer of nested bitmaps, kind "nested" of packed files of version 2, which the package only reads."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsessm.checkpoint.coded import UNSTORED, Coded
from sparsessm.checkpoint.encoding import GROUP, Bools
from sparsessm.checkpoint.nested import BY_EIGHTS, EIGHT, EMPTY, NESTED


def nested(
    name: str, dtype: torch.dtype, codes: Tensor, rows: Tensor, columns: Tensor, forms: Tensor
) -> Coded:
    """A matrix of codes as nested bitmaps.

    Args:
        codes: (rows, cols) integers. rows, columns: float16 factors whose lowest `UNSTORED` bits are zero.
        forms: (rows,), how each row is stored; an `EMPTY` one is zero.
    """
    whole, how = codes.numpy().astype(np.int32), forms.numpy().astype(np.int64)
    assert not whole[how == EMPTY].any()
    streams = [_stream(whole[at : at + GROUP], how[at : at + GROUP]) for at in range(0, len(whole), GROUP)]
    pairs = np.append(how, 0)[: len(how) + len(how) % 2].reshape(-1, 2)
    factors: dict[str, Tensor] = {}
    for part, values in (("rows", rows), ("columns", columns)):
        bits = values.half().contiguous().view(torch.int16)
        assert not (bits & (1 << UNSTORED) - 1).any()
        factors[part] = (bits >> UNSTORED).to(torch.uint8)
    arrays = {
        "starts": torch.from_numpy(np.cumsum([0, *map(len, streams)], dtype=np.int64)),
        "planes": torch.from_numpy(np.concatenate(streams)),
        "forms": torch.from_numpy((pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)),
        **factors,
    }
    coded = Coded(name, tuple(codes.shape), dtype, "nested", 0, 0, arrays)
    coded.check(contents=False)
    return coded


def _stream(codes: NDArray[np.int32], forms: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A group of rows: what is not zero, the planes of that, and the lowest bits of each row."""
    columns, low = codes.shape[1], np.maximum(forms - NESTED, 0)[:, None]
    shifted = codes + (1 << low >> 1)
    high = shifted >> low
    parts: list[Bools] = []
    for row, form in zip(high != 0, forms, strict=True):
        if form == BY_EIGHTS:
            eights = np.pad(row, (0, -columns % EIGHT)).reshape(-1, EIGHT).any(1)
            parts += [eights, row[np.repeat(eights, EIGHT)[:columns]]]
        elif form != EMPTY:
            parts.append(row)
    size = np.abs(high[high != 0])
    parts.append((high < 0)[high != 0])
    level = 1
    while size.size:
        larger = size > level
        parts.append(larger)
        size, level = size[larger], level + 1
    for row, (apart,) in zip(shifted, low, strict=True):
        if apart:
            parts.append((row[:, None] >> np.arange(apart) & 1).astype(np.bool_).ravel())
    return np.packbits(np.concatenate(parts), bitorder="little")
