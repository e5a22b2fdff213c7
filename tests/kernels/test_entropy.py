"""The entropy coder: there and back to the bit, natively and without the extension; near what an ideal code
takes; safe on any bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsessm import kernels
from sparsessm.kernels import entropy, entropy_plain

Codes, Floats = NDArray[np.int16], NDArray[np.float64]
WAYS = [True, False] if kernels.NATIVE else [False]
needs_native = pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")


def scales(rows: int, columns: int, size: float, rough: float = 0.7, seed: int = 0) -> Floats:
    """Sizes that differ from row to row and from column to column."""
    draw = np.random.default_rng(seed)
    return size * np.exp(rough * draw.standard_normal((rows, 1)) + 0.3 * draw.standard_normal(columns))


def drawn(rows: int, columns: int, size: float, rough: float = 0.7, seed: int = 0) -> Codes:
    """Normal numbers of these sizes, rounded."""
    exact = scales(rows, columns, size, rough, seed) * np.random.default_rng(seed + 1).standard_normal(
        (rows, columns)
    )
    return np.rint(exact).clip(-32767, 32767).astype(np.int16)


def ideal(codes: Codes, sizes: Floats) -> float:
    """Bits of rounded normal numbers under a code that knows the size of each: no other takes fewer."""
    least, most = (
        torch.special.erfc(torch.from_numpy((np.abs(codes) + side) / sizes / 2**0.5)) for side in (-0.5, 0.5)
    )
    return -float(((least - most) / 2).clamp(min=1e-300).log2().sum())


@st.composite
def matrices(draw: st.DrawFn) -> Codes:
    rows, columns = draw(st.sampled_from([1, 2, 3, 63, 65])), draw(st.integers(1, 70))
    size = draw(st.sampled_from([0.0, 0.1, 0.8, 3.0, 40.0, 3000.0, 1e5]))
    codes = drawn(rows, columns, size, draw(st.sampled_from([0.0, 1.5])), draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        codes[:, draw(st.integers(0, columns - 1))] = draw(st.sampled_from([0, 1, -32767, 32767]))
    return codes


@given(matrices())
@settings(deadline=None, max_examples=100)
def test_codes_come_back_and_the_extension_changes_no_byte(codes: Codes) -> None:
    found = []
    for native in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "NATIVE", native)
            arrays = entropy.encode(codes)
            assert entropy.size(codes) == 8 * sum(array.nbytes for array in arrays.values())
        found.append(arrays)
        for again in WAYS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "NATIVE", again)
                assert np.array_equal(entropy.decode(arrays, codes.shape), codes)
    for part in found[0]:
        assert all(np.array_equal(found[0][part], other[part]) for other in found)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_groups_and_threads_give_the_same_bytes(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = drawn(700, 600, 2.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    arrays = entropy.encode(codes)
    assert len(arrays["ends"]) == -(-700 // 64) and np.array_equal(entropy.decode(arrays, codes.shape), codes)
    monkeypatch.undo()
    assert all(np.array_equal(array, arrays[part]) for part, array in entropy.encode(codes).items())


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 12.0])
@pytest.mark.parametrize(
    ("rows", "columns", "more"), [(1024, 1024, 0.04), (1024, 256, 0.06), (48, 512, 0.16), (512, 16, 0.32)]
)
def test_it_takes_what_an_ideal_code_takes(rows: int, columns: int, more: float, size: float) -> None:
    """One that knows how large each code is on average for nothing; here so many bits a code more."""
    least = ideal(drawn(rows, columns, size), scales(rows, columns, size))
    assert 0.99 * least <= entropy.size(drawn(rows, columns, size)) <= least + more * rows * columns


def test_rows_and_columns_that_are_zero_take_nothing() -> None:
    codes = np.zeros((480, 512), np.int16)
    assert entropy.size(codes) == 8 * (64 + 128) + 8  # of each group its end and four states; a table
    codes[::2, ::2] = drawn(240, 256, 2.0)
    alone = entropy.size(np.ascontiguousarray(codes[::2, ::2]))
    assert entropy.size(codes) < 1.02 * alone + 8 * (64 + 128) + 4 * (240 + 256)


def test_groups_have_enough_entries() -> None:
    assert [entropy.together(columns) for columns in (1, 16, 256, 512, 513, 9000)] == [
        32768, 2048, 128, 64, 64, 64,
    ]  # fmt: skip


def test_a_token_says_how_many_bits_follow() -> None:
    """16 magnitudes of their own, then four tokens for each power of two."""
    tokens, sizes = entropy_plain.tokens(), np.arange(2**15)
    assert tokens[:17].tolist() == [*range(17)] and tokens[-1] == entropy_plain.TOKENS - 1
    firsts = np.flatnonzero(np.diff(tokens, prepend=255))
    assert np.array_equal(np.diff(firsts, append=2**15), 1 << entropy_plain.EXTRA)
    assert np.array_equal(tokens[sizes], np.searchsorted(firsts, sizes, side="right") - 1)


REFUSED: list[tuple[Any, str]] = [
    (np.zeros((2, 3), np.int32), r"codes are int32 \[2, 3\]; expected int16 \[rows, cols\]"),
    (np.zeros((0, 3), np.int16), r"codes are int16 \[0, 3\]"),
    (np.zeros(3, np.int16), r"codes are int16 \[3\]"),
    (np.full((1, 2), -32768, np.int16), "a code is -32768; allowed: -32767 to 32767"),
]


@pytest.mark.parametrize(("codes", "words"), REFUSED)
def test_what_is_no_codes(codes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        entropy.encode(codes)


SPOILT = [
    ("ends", lambda x: x - 1, "'ends' does not rise to the"),
    ("ends", lambda x: x[::-1].copy(), "'ends' does not rise to the"),
    (
        "ends",
        lambda x: np.concatenate([x[:1] - 1, x[1:]]),
        "'stream' [a-z ]* rows (0|64) and on",
    ),
    ("ends", lambda x: np.where(x == x[-1], x, 3), "'stream' ends inside of rows 0 and on"),
    ("stream", lambda x: np.concatenate([x[:-1], x[-1:] | 128]), "'stream' goes on behind rows 64 and on"),
    ("stream", lambda x: x * 0, "'stream' does not come out even in rows 0 and on"),
    ("stream", lambda x: x * 0 + 255, "'stream' [a-z ]* in(side of)? rows (0|64) and on"),
    ("tables", lambda x: x[:-1], "'tables' ends inside of a table"),
    ("tables", lambda x: np.append(x, x[:0]) * 0, r"'tables' has \d+ tables; allowed: 1, 2, 4, 8 or 16"),
    ("tables", lambda x: x[:0], "'tables' has 0 tables"),
    ("tables", lambda x: np.array([60, *[1] * 60], np.uint8), "has 60 frequencies in a table; at most 59"),
    (
        "tables",
        lambda x: np.array([2, 255, 255], np.uint8),
        "has frequencies of 16128 in a table; at most 4096",
    ),
    ("classes", lambda x: x[:-1], "'classes' has \\d+ bytes for 66 rows and 513 columns of"),
    (
        "classes",
        lambda x: np.concatenate([x[:-1], x[-1:] | 128]),
        "'classes' has bits set behind its la",
    ),
]


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize(("part", "spoil", "words"), SPOILT)
def test_arrays_that_stand_for_nothing(
    native: bool, part: str, spoil: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "NATIVE", native)
    codes = drawn(66, 513, 20.0)
    arrays = entropy.encode(codes)
    spoilt = arrays | {part: np.ascontiguousarray(spoil(arrays[part]))}
    if part == "tables" and len(spoilt["tables"]) in (3, 61):
        spoilt["classes"] = arrays["classes"][:0]  # of one table
    with pytest.raises(ValueError, match=words):
        entropy.decode(spoilt, codes.shape)


@needs_native
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_bytes_give_codes_or_the_same_line(data: st.DataObject) -> None:
    codes = drawn(66, 500, data.draw(st.sampled_from([0.5, 30.0])))
    arrays = entropy.encode(codes)
    for part in data.draw(
        st.lists(st.sampled_from(["stream", "stream", "tables", "classes", "ends"]), min_size=1)
    ):
        at = data.draw(st.integers(0, len(arrays[part]) - 1))
        arrays[part] = arrays[part].copy()
        arrays[part][at] = data.draw(st.integers(0, 255))
    told = []
    for native in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "NATIVE", native)
            try:
                told.append(entropy.decode(arrays, codes.shape).tolist())
            except ValueError as error:
                told.append(str(error).partition(" rows ")[0])
    assert told[0] == told[1] or {told[0], told[1]} <= {
        "'stream' ends inside of", "'stream' does not come out even in", "'stream' goes on behind",
    }  # fmt: skip


@needs_native
def test_the_native_door_refuses_what_it_would_read_beyond() -> None:
    codes, native = drawn(70, 513, 2.0), kernels.built()
    rows, columns = np.zeros(70, np.uint8), np.zeros(513, np.uint8)
    table, ends, prices = np.zeros(1, np.uint8), np.zeros(2, np.int64), np.zeros((1, 60), np.int32)
    calls: list[tuple[Any, str]] = [
        (lambda: native.entropy_tally(1, codes, rows[1:], columns, 1), "by_row: 69 numbers, expected 70"),
        (lambda: native.entropy_tally(1, codes, rows, columns, 3), "tables: 3; allowed: 1, 2, 4, 8 and 16"),
        (lambda: native.entropy_tally(1, codes, rows + 1, columns, 1), "a class that has no table"),
        (lambda: native.entropy_tally(1, codes * 0 - 32767 - 1, rows, columns, 1), "codes: -32768; allowed"),
        (lambda: native.entropy_assign(1, codes, rows, columns[1:], prices), "by_column: 512 numbers"),
        (lambda: native.entropy_assign(1, codes, rows, columns, prices[:, 1:].copy()), "prices: 60 tokens"),
        (lambda: native.entropy_encode(1, codes, rows, columns, 1, table, 64, ends), "a code without a freq"),
        (lambda: native.entropy_encode(1, codes, rows, columns, 1, table, 0, ends), "together: at least 1"),
        (lambda: native.entropy_encode(1, codes, rows, columns, 1, table, 8, ends), "ends: 2 numbers, expec"),
        (lambda: native.entropy_decode(1, table, ends, rows, columns, 1, table, 64, codes), "'ends' does"),
        (lambda: native.entropy_decode(1, table, ends - 1, rows, columns, 1, table, 64, codes), "'ends'"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()
