"""Entropy coding of small integers, the codes of matrices on the dial: lossless, near what any code takes.

Part of the kernels' door. Asymmetric numeral systems (Duda, arXiv 1311.2540), four states interleaved
(Giesen, arXiv 1402.3392). Codes of a row are alike in size, and so are those of a column: each has a class,
and the two say together which of at most 16 tables of frequencies an entry is coded with.
docs/sparse-format.md (kind "ans") says what the bytes are. Native (entropy.cpp) where the extension is built,
else NumPy (entropy_plain.py), with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsessm import kernels
from sparsessm.kernels import entropy_plain as plain

MOST_CODE = plain.MOST_CODE
MANY = (16, 8, 4, 2, 1)  # tables of a matrix
_LEAST_ROWS, _LEAST_ENTRIES = 64, 1 << 15  # of a group
_LARGE = 1 << 18  # entries, from which on most tables are best
_ROUNDS = 4  # of tables and classes that are fitted to each other
_FLOOR = 2.0**-6  # mean magnitude below which rows are alike
_PRICE = 256  # units of a bit, whole numbers: sums do not depend on their order

Codes = NDArray[np.int16]
Arrays = dict[str, NDArray[Any]]


def together(columns: int) -> int:
    """Rows of a group: the smallest power of two from 64 on that has 2^15 entries."""
    rows = _LEAST_ROWS
    while rows * columns < _LEAST_ENTRIES:
        rows *= 2
    return rows


def encode(codes: Codes) -> Arrays:
    """Codes as they are stored.

    Args:
        codes: (rows, cols) from -32767 to 32767, neither of them 0.

    Returns:
        "ends": int64 (groups,), where each group of `together` rows ends in "stream", uint8. "classes":
        uint8, log2(tables) bits for each row and each column. "tables": uint8, frequencies.

    Raises:
        ValueError: another dtype or shape, a code beyond.
    """
    codes = _expected(codes)
    by_row, by_column, tallies = _fitted(codes)
    many, (rows, columns) = len(tallies), codes.shape
    tables = _table_bytes(tallies)[0]
    ends = np.empty(-(-rows // together(columns)), np.int64)
    how = (codes, by_row, by_column, many, tables, together(columns), ends)
    stream = kernels.built().entropy_encode(_threads(), *how) if kernels.NATIVE else plain.encode(*how)
    bits = _class_bits(many)
    classes = np.concatenate([by_row, by_column])[:, None] >> np.arange(bits, dtype=np.uint8) & 1
    return {
        "ends": ends,
        "stream": stream,
        "classes": np.packbits(classes.astype(np.uint8).ravel(), bitorder="little"),
        "tables": tables,
    }


def size(codes: Codes) -> int:
    """Bits of all that `encode` gives.

    Raises:
        ValueError: as `encode`.
    """
    return 8 * sum(array.nbytes for array in encode(codes).values())


def decode(arrays: Mapping[str, NDArray[Any]], shape: tuple[int, int]) -> Codes:
    """The codes, of this shape. Safe on any bytes.

    Args:
        arrays: as from `encode`, of the same dtypes; "ends" of the right length.

    Raises:
        ValueError: arrays that `encode` did not give, with the name of the one that is wrong.
    """
    rows, columns = shape
    tables, classes, ends = arrays["tables"], arrays["classes"], arrays["ends"]
    stream, many = arrays["stream"], _count(tables)
    bits = _class_bits(many)
    if len(classes) != -(-(rows + columns) * bits // 8):
        raise ValueError(
            f"'classes' has {len(classes)} bytes for {rows} rows and {columns} columns of {bits} bits"
        )
    held = np.unpackbits(classes, bitorder="little")
    if held[(rows + columns) * bits :].any():
        raise ValueError("'classes' has bits set behind its last column")
    held = held[: (rows + columns) * bits].reshape(rows + columns, bits)
    found = (held << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if (np.diff(ends, prepend=0) < 0).any() or ends[-1] != len(stream):
        raise ValueError(f"'ends' does not rise to the {len(stream)} bytes of 'stream'")
    how = (stream, ends, found[:rows], found[rows:], many, tables, together(columns))
    if not kernels.NATIVE:
        return plain.decode(*how)
    codes = np.empty(shape, np.int16)
    kernels.built().entropy_decode(_threads(), *how, codes)
    return codes


def _threads() -> int:
    return torch.get_num_threads()


def _expected(codes: Codes) -> Codes:
    if codes.dtype != np.int16 or codes.ndim != 2 or not codes.size:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; expected int16 [rows, cols]")
    if int(codes.min()) < -MOST_CODE:
        raise ValueError(f"a code is {int(codes.min())}; allowed: -{MOST_CODE} to {MOST_CODE}")
    return np.ascontiguousarray(codes)


def _class_bits(many: int) -> int:
    return many.bit_length() - 1


def _count(tables: NDArray[np.uint8]) -> int:
    at = many = 0
    while at < len(tables):
        at, many = at + 1 + int(tables[at]), many + 1
    if at > len(tables):
        raise ValueError("'tables' ends inside of a table")
    if many not in MANY:
        raise ValueError(f"'tables' has {many} tables; allowed: 1, 2, 4, 8 or 16")
    return many


def _tally(codes: Codes, by_row: NDArray[Any], by_column: NDArray[Any], many: int) -> NDArray[np.int64]:
    how = (codes, by_row, by_column, many)
    if not kernels.NATIVE:
        return plain.tally(*how)
    return kernels.built().entropy_tally(_threads(), *how).reshape(many, plain.TOKENS)


def _assign(codes: Codes, by_column: NDArray[Any], prices: NDArray[np.int32]) -> NDArray[np.uint8]:
    if not kernels.NATIVE:
        return plain.assign(codes, by_column, prices)
    by_row = np.zeros(len(codes), np.uint8)
    kernels.built().entropy_assign(_threads(), codes, by_row, by_column, prices)
    return by_row


def _fitted(codes: Codes) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
    """Classes of rows and of columns, and tallies of their tables: of so many tables as take fewest bits."""
    by_rows, by_columns = _means(codes)
    turned = np.ascontiguousarray(codes.T)
    best, least = None, 0.0
    for many in MANY[:1] if codes.size >= _LARGE else MANY:
        by_row, by_column = _started(by_rows, by_columns, many)
        tallies = _tally(codes, by_row, by_column, many)
        for _ in range(_ROUNDS if many > 1 else 0):
            prices = _prices(tallies)
            by_row = _assign(codes, by_column, prices)
            prices = _prices(_tally(codes, by_row, by_column, many))
            by_column = _assign(turned, by_row, prices)
            tallies = _tally(codes, by_row, by_column, many)
        bits = _table_bytes(tallies)[1] + _class_bits(many) * sum(codes.shape)
        if best is not None and bits >= least:
            break  # even fewer tables take more
        best, least = (by_row, by_column, tallies), bits
    assert best is not None
    return best


def _means(codes: Codes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean magnitude of each row, and of each column in units of the whole."""
    by_row, by_column = np.empty(len(codes), np.int64), np.zeros(codes.shape[1], np.int64)
    for row in range(0, len(codes), 256):
        size = np.abs(codes[row : row + 256])
        by_row[row : row + 256] = size.sum(1, dtype=np.int64)
        by_column += size.sum(0, dtype=np.int64)
    total = max(int(by_column.sum()), 1)
    return by_row / codes.shape[1], by_column * (codes.shape[1] / total)


def _started(
    by_rows: NDArray[np.float64], by_columns: NDArray[np.float64], many: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """First classes: rows in even steps of the logarithm of their mean, columns by their factor to it."""
    rows = np.log2(np.maximum(by_rows, _FLOOR))
    columns = np.log2(np.maximum(by_columns, _FLOOR))
    step = max(float(rows.max() - rows.min()), 0.5) / max(many - 1, 1)
    by_row = np.rint((rows - rows.min()) / step)
    by_column = np.rint(columns / step) + many // 2
    return tuple(np.clip(found, 0, many - 1).astype(np.uint8) for found in (by_row, by_column))  # type: ignore[return-value]


def _prices(tallies: NDArray[np.int64]) -> NDArray[np.int32]:
    """What each token costs with each table, in units of 1/256 bit; a token that a table has not seen costs
    what its neighbours, and all tables, have seen of it."""
    seen = tallies.astype(np.float64)
    beside = seen.copy()
    beside[1:] += 0.02 * seen[:-1]
    beside[:-1] += 0.02 * seen[1:]
    beside += 1e-3 * seen.sum(0) / seen.sum() + 1e-6
    return np.rint(-_PRICE * np.log2(beside / beside.sum(1, keepdims=True))).astype(np.int32)


def _table_bytes(tallies: NDArray[np.int64]) -> tuple[NDArray[np.uint8], float]:
    """Frequencies as they are stored, and the bits that they and tokens coded with them take.

    Nearest ones, and where these leave nothing for the zeros, smaller ones.
    """
    grid = plain.frequencies(np.arange(256))
    whole = np.maximum(tallies.sum(1, keepdims=True), 1)
    near = plain.TOTAL / 2 * tallies[:, 1:] / whole
    below = (plain.TOTAL / 2 - plain.TOKENS) * tallies[:, 1:] / whole
    there = tallies[:, 1:] > 0
    held = np.searchsorted((grid[1:] + grid[:-1]) / 2, near, side="right").clip(1) * there
    lower = (np.searchsorted(grid, below, side="right") - 1).clip(1) * there
    held = np.where(2 * grid[held].sum(1, keepdims=True) < plain.TOTAL, held, lower)
    often = grid[held]
    often = np.concatenate([plain.TOTAL - 2 * often.sum(1, keepdims=True), often], 1)
    costs = tallies * (plain.BITS - np.log2(np.maximum(often, 1)))
    parts = []
    for row in held.astype(np.uint8):
        most = int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0
        parts += [np.array([most], np.uint8), row[:most]]
    tables = np.concatenate(parts)
    return tables, float(costs.sum()) + 8 * tables.nbytes
