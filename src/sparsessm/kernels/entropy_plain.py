"""The entropy coder without the extension, in NumPy: all states of all groups of rows side by side.

Part of entropy.py, and bit for bit what entropy.cpp does. docs/sparse-format.md (kind "ans") says what the
bytes are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = 12
TOTAL = 1 << BITS  # of the frequencies of a table
TOKENS = 60  # magnitudes of codes, from `DIRECT` on several to a token
DIRECT = 16
MOST_CODE = 2**15 - 1
_LEAST = 1 << 16  # a state is never below
_LANES = 4  # states that take turns, column by column
_ZERO = TOKENS - 1  # symbol of a 0; of a token t with its sign: _ZERO + t, _ZERO - t

Ints = NDArray[Any]
EXTRA = np.array([0] * DIRECT + [power - 2 for power in range(4, 15) for _ in range(4)])
"""Bits behind each token."""


@cache
def tokens() -> Ints:
    """The token of each magnitude, uint8 (32768,)."""
    size = np.arange(MOST_CODE + 1)
    power = np.maximum(np.log2(np.maximum(size, 1)).astype(np.int64), 4)
    power -= size < 1 << power  # should a logarithm be rounded up
    power = np.maximum(power, 4)
    return np.where(size < DIRECT, size, DIRECT + 4 * (power - 4) + (size >> power - 2 & 3)).astype(np.uint8)


def frequencies(held: Ints) -> Ints:
    """What bytes of tables stand for: the lowest 5 bits, or 32 + these, times a power of two."""
    held = held.astype(np.int64)
    return np.where(held < 32, held & 31, (32 + (held & 31)) << np.maximum(held >> 5, 1) - 1)


def tables_of(by_row: Ints, by_column: Ints, many: int) -> Ints:
    """Which table each entry has, (rows, cols)."""
    both = by_row.astype(np.int64)[:, None] + by_column.astype(np.int64)
    return np.clip(both - many // 2, 0, many - 1)


def tally(codes: Ints, by_row: Ints, by_column: Ints, many: int) -> Ints:
    """How often each token has each table, int64 (many, TOKENS)."""
    total = np.zeros(many * TOKENS, np.int64)
    for row in range(0, len(codes), 64):
        part = slice(row, row + 64)
        found = tokens()[np.abs(codes[part])] + TOKENS * tables_of(by_row[part], by_column, many)
        total += np.bincount(found.ravel(), minlength=len(total))
    return total.reshape(many, TOKENS)


def assign(codes: Ints, by_column: Ints, prices: Ints) -> Ints:
    """The class of each row with which its tokens cost least, uint8 (rows,)."""
    many = len(prices)
    which = tables_of(np.arange(many), np.arange(many), many)
    costs = prices.astype(np.int64)[which].reshape(many, -1)
    best = []
    for row in codes:
        found = tokens()[np.abs(row)] + TOKENS * by_column.astype(np.int64)
        best.append((costs @ np.bincount(found, minlength=many * TOKENS)).argmin())
    return np.array(best, np.uint8)


def encode(
    codes: Ints, by_row: Ints, by_column: Ints, many: int, tables: Ints, together: int, ends: Ints
) -> Ints:
    """The stream, uint8; writes where each group ends into `ends`.

    Raises:
        ValueError: a token without a frequency.
    """
    often, start = _symbols(parsed(tables, many))
    token = tokens()[np.abs(codes)].astype(np.int64)
    symbol = _by_turn(np.where(codes < 0, _ZERO - token, _ZERO + token), together)
    which = _by_turn(tables_of(by_row, by_column, many), together)
    there = _by_turn(np.ones(codes.shape, np.bool_), together)
    often, start = often[which, symbol], start[which, symbol]
    if (often[there] == 0).any():
        raise ValueError("a code without a frequency")
    states = np.full(symbol.shape[1:], _LEAST, np.int64)
    words, told = np.zeros(symbol.shape, np.uint16), np.zeros(symbol.shape, np.bool_)
    for turn in range(len(symbol) - 1, -1, -1):
        live, f = there[turn], np.maximum(often[turn], 1)
        told[turn] = live & (states >= f << 32 - BITS)
        words[turn] = states & 65535
        states = np.where(told[turn], states >> 16, states)
        states = np.where(live, (states // f << BITS) + states % f + start[turn], states)
    streams = []
    for group, first in enumerate(range(0, len(codes), together)):
        size = np.abs(codes[first : first + together].astype(np.int64)).ravel()
        wide = size[size >= DIRECT]
        extra = EXTRA[tokens()[wide]]
        bits = (wide[:, None] >> np.arange(13) & 1)[np.arange(13) < extra[:, None]]
        parts = [states[group].astype("<u4"), words[:, group][told[:, group]].astype("<u2")]
        parts.append(np.packbits(bits.astype(np.uint8), bitorder="little"))
        streams.append(np.concatenate([part.view(np.uint8) for part in parts]))
    ends[:] = np.cumsum([len(stream) for stream in streams])
    return np.concatenate(streams)


def decode(
    stream: Ints, ends: Ints, by_row: Ints, by_column: Ints, many: int, tables: Ints, together: int
) -> Ints:
    """The codes, int16 (rows, cols).

    Raises:
        ValueError: tables or a stream that nobody could have written.
    """
    often, start = _symbols(parsed(tables, many))
    shape = len(by_row), len(by_column)
    which = _by_turn(tables_of(by_row, by_column, many), together)
    there = _by_turn(np.ones(shape, np.bool_), together)
    slots = np.stack([np.repeat(np.arange(len(row)), row) for row in often[:, _order()]])
    slots = _order()[slots]
    begins = np.concatenate([[0], ends[:-1]])
    padded = np.concatenate([stream, np.zeros(4 * _LANES, np.uint8)]).astype(np.int64)

    def refuse(wrong: NDArray[np.bool_], words: str) -> None:
        if wrong.any():
            raise ValueError(f"'stream' {words} rows {int(wrong.argmax()) * together} and on")

    refuse(ends - begins < 4 * _LANES, "ends inside of")
    held = padded[begins[:, None] + np.arange(4 * _LANES)].reshape(len(ends), _LANES, 4)
    states = (held << np.arange(0, 32, 8)).sum(2)
    refuse((states < _LEAST).any(1), "does not come out even in")
    at = begins + 4 * _LANES
    symbols = np.empty(there.shape, np.int16)
    for turn, live in enumerate(there):
        slot = states & TOTAL - 1
        symbol = slots[which[turn], slot]
        after = often[which[turn], symbol] * (states >> BITS) + slot - start[which[turn], symbol]
        more = live & (after < _LEAST)
        place = at[:, None] + 2 * (np.cumsum(more, 1) - more)
        refuse((more & (place + 2 > ends[:, None])).any(1), "ends inside of")
        word = padded[place] | padded[place + 1] << 8
        states = np.where(live, np.where(more, after << 16 | word, after), states)
        symbols[turn], at = symbol - _ZERO, at + 2 * more.sum(1)
    refuse((states != _LEAST).any(1), "does not come out even in")
    codes = _in_rows(symbols, shape, together)
    for group, first in enumerate(range(0, len(codes), together)):
        mine = codes[first : first + together].reshape(-1)
        alone = np.arange(len(ends)) == group
        wide = np.flatnonzero(np.abs(mine) >= DIRECT)
        extra = EXTRA[np.abs(mine[wide])]
        bits = np.unpackbits(stream[at[group] : ends[group]], bitorder="little")
        refuse(alone & (len(bits) < extra.sum()), "ends inside of")
        refuse(alone & (len(bits) - extra.sum() >= 8 or bits[extra.sum() :].any()), "goes on behind")
        parts = np.zeros((len(wide), 13), np.int64)
        parts[np.arange(13) < extra[:, None]] = bits[: extra.sum()]
        size = (4 + (np.abs(mine[wide]) & 3) << extra) + (parts << np.arange(13)).sum(1)
        mine[wide] = np.where(mine[wide] < 0, -size, size)
    return codes


def parsed(tables: Ints, many: int) -> Ints:
    """The frequencies of each token in each table, int64 (many, TOKENS).

    Raises:
        ValueError: bytes that do not stand for so many tables.
    """
    found, at = [], 0
    while at < len(tables):
        most, at = int(tables[at]), at + 1
        if most >= TOKENS:
            raise ValueError(f"'tables' has {most} frequencies in a table; at most {TOKENS - 1}")
        if len(tables) - at < most:
            raise ValueError("'tables' ends inside of a table")
        row = np.zeros(TOKENS, np.int64)
        row[1 : most + 1] = frequencies(tables[at : at + most])
        row[0] = TOTAL - 2 * row.sum()
        if row[0] < 0:
            raise ValueError(f"'tables' has frequencies of {TOTAL - row[0]} in a table; at most {TOTAL}")
        found.append(row)
        at += most
    if len(found) != many:
        raise ValueError(f"'tables' has {len(found)} tables, expected {many}")
    return np.stack(found)


def _order() -> Ints:
    """Symbols in the order of their slots: 0, 1, -1, 2, -2, ..."""
    sizes = np.repeat(np.arange(1, TOKENS), 2)
    return _ZERO + np.concatenate([[0], np.where(np.arange(len(sizes)) % 2, -sizes, sizes)])


def _symbols(tables: Ints) -> tuple[Ints, Ints]:
    """(frequency, first slot) of each symbol in each table."""
    often = tables[:, np.abs(np.arange(2 * TOKENS - 1) - _ZERO)]
    start = np.empty_like(often)
    start[:, _order()] = np.cumsum(often[:, _order()], 1) - often[:, _order()]
    return often, start


def _by_turn(entries: Ints, together: int) -> Ints:
    """(rows, cols) -> (turns, groups, lanes): in the order in which a group's states take turns; padded."""
    rows, columns = entries.shape
    groups, wide, together = -(-rows // together), -(-columns // _LANES), min(together, rows)
    whole = np.zeros((groups * together, wide * _LANES), entries.dtype)
    whole[:rows, :columns] = entries
    return np.moveaxis(whole.reshape(groups, together * wide, _LANES), 1, 0)


def _in_rows(turns: Ints, shape: tuple[int, int], together: int) -> Ints:
    """The reverse of `_by_turn`."""
    whole = np.moveaxis(turns, 0, 1).reshape(turns.shape[1] * min(together, shape[0]), -1)
    return np.ascontiguousarray(whole[: shape[0], : shape[1]])
