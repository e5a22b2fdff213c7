"""A matrix in GGUF's blocks of 32: what `exporting.py` writes of it.

A block is a float16 scale d and 32 codes; a value is d times its code, Q4_0's from -8 to 7, Q8_0's from -127
to 127 (ggml-quants.c). llama.cpp chooses d from the value farthest from 0, which does not give values back
that another d made. Blocks that some d makes exactly are therefore found, and written as they are: those of
`--grid q4_0` all are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .packed_tensor import chunks

SIZE = 32  # values
CODES = {"q4_0": (-8, 7), "q8_0": (-127, 127)}  # least and largest


def blocks(values: NDArray[np.float32], kind: str, library: Any) -> NDArray[np.uint8]:
    """The bytes of a matrix: exactly its values where blocks have them, else as llama.cpp rounds them.

    Args:
        values: (rows, cols), finite, in rows of whole blocks. kind: of `CODES`. library: the package gguf.

    Returns:
        (rows, bytes).
    """
    form, found = library.GGMLQuantizationType[kind.upper()], []
    for part in chunks(*values.shape):
        some = np.ascontiguousarray(values[part])
        held = library.quants.quantize(some, form)
        other = (library.quants.dequantize(held, form) != some).reshape(-1, SIZE).any(1)
        by_block = held.reshape(len(other), -1)
        for places, scale, codes in exact(some.reshape(-1, SIZE), np.flatnonzero(other), kind):
            by_block[places, :2] = scale[:, None].view(np.uint8)
            by_block[places, 2:] = _packed(codes, kind)
        found.append(by_block.reshape(held.shape))
    return np.concatenate(found)


def exact(
    values: NDArray[np.float32], places: NDArray[np.int64], kind: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.int8]]]:
    """The scales and codes that make blocks exactly, as far as there are any.

    The value farthest from 0 has some code, and a code gives the scale: every one is tried, the farthest
    first.

    Args:
        values: (blocks, 32), finite. places: of the blocks that are looked at.

    Yields:
        Places, and of each its scale and its 32 codes.
    """
    least, largest = CODES[kind]
    for code in sorted(set(range(least, largest + 1)) - {0}, key=abs, reverse=True):
        farthest = values[places, np.abs(values[places]).argmax(1)]
        with np.errstate(over="ignore"):
            scale = (farthest / np.float32(code)).astype(np.float16)
        wide = scale.astype(np.float32)
        able = np.flatnonzero((wide * np.float32(code) == farthest) & (wide != 0))
        some, wide = values[places[able]], wide[able, None]
        codes = (some / wide).round().clip(least, largest)
        same = (codes * wide == some).all(1)
        done = able[same]
        if len(done):
            yield places[done], scale[done], codes[same].astype(np.int8)
            places = np.delete(places, done)


def _packed(codes: NDArray[np.int8], kind: str) -> NDArray[np.uint8]:
    """The bytes of codes (blocks, 32): of Q4_0 two in each, the first half of a block in the lower bits."""
    if kind == "q8_0":
        return codes.view(np.uint8)
    low, high = (codes + 8).astype(np.uint8).reshape(-1, 2, SIZE // 2).swapaxes(0, 1)
    return low + np.uint8(16) * high
