"""Matrices of integer codes of few bits at every level, against sums in float64; and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import close, numbers, probe, seen
from torch import Tensor

from sparsessm import kernels
from sparsessm.kernels.matrix import Matrix, rounded

pytestmark = pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")
COLUMNS = [1, 3, 63, 64, 65, 130, 769]
ROWS = [1, 2, 9, 16, 17, 33, 64, 65, 130, 290]  # around strips of 16 and bands of 64
LENGTHS = [1, 2, 3, 4, 5, 15, 16, 33]
SPREADS = [0, 0.3, 0.7, 1.5, 3, 6, 12, 25, 50, 5000]  # of codes: each asks for another width


def codes(rows: int, cols: int, spread: float, seed: int = 0) -> Tensor:
    """Integers with long tails."""
    found = numbers(rows, cols, seed=seed) * numbers(rows, cols, seed=seed + 1).abs() * spread
    return found.round().clamp(-32768, 32767).short()


def scales(rows: int, cols: int, factored: bool) -> tuple[Tensor, Tensor | None]:
    return numbers(rows, seed=9).abs() + 0.1, numbers(cols, seed=8).abs() + 0.1 if factored else None


def weights(found: Tensor, scale: Tensor, columns: Tensor | None) -> Tensor:
    """(rows, cols) float32, products in the order of docs/sparse-format.md."""
    out = found.float() * scale[:, None]
    return out if columns is None else out * columns


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("cols", COLUMNS)
def test_products_of_every_width_and_shape(level: str, cols: int, factored: bool) -> None:
    for case, spread in enumerate(SPREADS):
        rows = ROWS[(case + cols) % len(ROWS)]
        found, (scale, columns) = codes(rows, cols, spread, seed=case), scales(rows, cols, factored)
        made, exact = Matrix.codes(found, scale, columns), weights(found, scale, columns)
        assert (made.rows, made.cols, made.sparse) == (rows, cols, False)
        for index in range(rows):
            assert torch.equal(made.row(index), exact[index])
        bias, wide = numbers(rows, seed=3) if case % 2 else None, numbers(130, cols + 7, seed=case)
        for length in LENGTHS:
            x = wide[:length, 3 : 3 + cols]  # strided
            met = seen(x, found, columns)
            room = scale if columns is None else scale * columns.max()
            assert close(made.linear(x, bias), met, exact.double(), room, bias), (spread, length)


def beside(rows: int, cols: int) -> int:
    """Bytes of all but codes and strays: where strips and their strays begin; of a row scale and place; the
    order of the columns; the widths."""
    strips = -(-rows // 16)
    return 16 * (strips + 1) + 5 * rows + 4 * cols + strips * 2 * -(-cols // 64)


def test_a_width_for_each_piece_and_bands_of_rows(level: str) -> None:
    """Large columns and large rows lie together, wherever they were."""
    generator = torch.Generator().manual_seed(0)
    large_rows = torch.rand(320, generator=generator) < 0.25
    large_columns = torch.randperm(256, generator=generator) < 64
    large, sign = large_rows[:, None] | large_columns, torch.randint(0, 2, (320, 256)).mul(2).sub(1)
    found = torch.where(large, 100, 1) * sign
    made = Matrix.codes(found.short(), torch.ones(320))
    wide = int((16 * (-(-large_rows.view(5, 64).sum(1) // 16))).sum())  # rows of strips that hold a large one
    bits = wide * 256 * 8 + (320 - wide) * (64 * 8 + 192 * 2)
    assert made.nbytes == bits // 8 + beside(320, 256)
    x = numbers(3, 256)
    assert close(made.linear(x), seen(x, found, None), found.double(), torch.full((320,), 100.0))


@pytest.mark.parametrize("width", range(1, 9))
def test_every_code_of_a_width_is_held_in_so_many_bits(level: str, width: int) -> None:
    least, most = -(1 << width - 1), (1 << width - 1) - 1
    draw = torch.Generator().manual_seed(width)
    found = torch.randint(least, most + 1, (32, 640), generator=draw).short()
    found[:, ::3] = least  # so that no piece does with fewer
    made, x = Matrix.codes(found, torch.ones(32)), numbers(15, 640)
    assert made.nbytes == 32 * 640 * width // 8 + beside(32, 640)
    assert all(torch.equal(made.row(i), found[i].float()) for i in range(32))
    assert close(made.linear(x), seen(x, found, None), found.double(), torch.ones(32))


def test_a_few_large_codes_do_not_widen_the_others(level: str) -> None:
    found = torch.ones(16, 640, dtype=torch.int16)
    found[1, 7], found[1, 639], found[6, 64] = 32767, -32768, -9
    made = Matrix.codes(found, torch.ones(16))
    # two bits, and apart 127 * 256 + 127 * 2, the same of the other sign, and -7
    assert made.nbytes == 16 * 640 * 2 // 8 + beside(16, 640) + 5 * 4
    assert all(torch.equal(made.row(i), found[i].float()) for i in range(16))
    x = numbers(5, 640)
    assert close(made.linear(x), seen(x, found, None), found.double(), torch.ones(16) * 10)


def test_rows_of_zeros_take_nothing(level: str) -> None:
    made = Matrix.codes(torch.zeros(9, 200, dtype=torch.int16), torch.ones(9))
    assert made.nbytes == beside(9, 200) and not made.linear(numbers(3, 200)).any() and not made.row(8).any()


@pytest.mark.parametrize("spread", [2, 9, 40, 700])
def test_levels_differ_by_no_more_than_a_fused_product(spread: float) -> None:
    """Integers are exact; of all levels only the portable one rounds products before it adds them."""
    found, (scale, columns) = codes(70, 200, spread), scales(70, 200, True)
    made, x, before = Matrix.codes(found, scale, columns), numbers(9, 200), kernels.LEVEL
    results = []
    try:
        for level in kernels.LEVELS[1:]:
            kernels.LEVEL = level
            results.append(made.linear(x))
    finally:
        kernels.LEVEL = before
    portable, *others = results
    assert all(torch.equal(other, others[0]) for other in others)
    assert all(torch.allclose(other, portable, rtol=1e-5, atol=1e-4 * spread) for other in others)


@pytest.mark.parametrize("factored", [False, True])
def test_decoding_multiplies_as_the_definition(level: str, factored: bool) -> None:
    for rows, cols, spread in ((1, 3, 1), (5, 64, 3), (9, 130, 0.5), (6, 769, 40)):
        found, (scale, columns) = codes(rows, cols, spread), scales(rows, cols, factored)
        exact = weights(found, scale, columns)
        logits, x = probe(Matrix.codes(found, scale, columns), numbers(rows, cols, seed=cols))
        unit = (x if columns is None else x * columns).abs().amax() / 127  # a tie may be rounded otherwise
        room = unit * (exact if columns is None else exact / columns).abs().amax(1)
        expected = seen(x, found, columns) @ exact.T
        assert ((logits - expected).abs() <= room + 2e-3 + 1e-4 * expected.abs()).all()


@pytest.mark.parametrize("factored", [False, True])
def test_a_row_of_inputs_gives_the_same_bits_alone_and_with_any_threads(level: str, factored: bool) -> None:
    for cols, spread in ((65, 2), (200, 9), (769, 700)):
        found, (scale, columns) = codes(211, cols, spread), scales(211, cols, factored)
        made, x = Matrix.codes(found, scale, columns), numbers(23, cols)
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(made.linear(x))
        assert all(torch.equal(result, results[0]) for result in results)
        for i in range(len(x)):
            assert torch.equal(made.linear(x[i : i + 1])[0], results[0][i])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_codes_are_the_sum_that_they_stand_for(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    spreads = torch.tensor(data.draw(st.lists(st.sampled_from(SPREADS), min_size=rows, max_size=rows)))
    found = codes(rows, cols, 1.0, data.draw(st.integers(0, 99))).float() * spreads[:, None]
    found, (scale, columns) = found.clamp(-32768, 32767).short(), scales(rows, cols, data.draw(st.booleans()))
    order = data.draw(st.none() | st.lists(st.integers(0, rows - 1), min_size=1, max_size=12))
    chosen = None if order is None else torch.tensor(order)
    made, stored = Matrix.codes(found, scale, columns, chosen), found if chosen is None else found[chosen]
    exact = weights(found, scale, columns)
    exact, scale = (exact, scale) if chosen is None else (exact[chosen], scale[chosen])
    x = numbers(data.draw(st.integers(1, 40)), cols, seed=7)
    room = scale if columns is None else scale * columns.max()
    before = kernels.LEVEL
    try:
        for level in kernels.LEVELS[1:]:
            kernels.LEVEL = level
            assert close(made.linear(x), seen(x, stored, columns), exact.double(), room)
    finally:
        kernels.LEVEL = before
    assert all(torch.equal(made.row(i), exact[i]) for i in range(made.rows))


@pytest.mark.parametrize("group", [32, 64, 96, 128, 640])
@pytest.mark.parametrize("odd", [False, True])
def test_groups_of_columns_have_scales_of_their_own(level: str, group: int, odd: bool) -> None:
    """And codes that are all odd take no bit more than their halves."""
    for rows, cols, spread in ((1, 33, 1), (3, 16, 2), (9, 96, 2), (17, 64, 3), (70, 200, 9), (33, 769, 40)):
        found = codes(rows, cols, spread)
        found = (2 * (found.int() // 4) + 1).short() if odd else found
        scale = numbers(rows, -(-cols // group), seed=cols).abs() + 0.1
        made = Matrix.codes(found, scale, group=group)
        exact = found.float() * scale.repeat_interleave(group, 1)[:, :cols]
        for row in range(rows):
            assert torch.equal(made.row(row), exact[row])
        x = numbers(21, cols, seed=3)
        result = made.linear(x)
        assert close(result, rounded(x), exact.double(), scale.amax(1))
        assert all(torch.equal(made.linear(x[i : i + 1])[0], result[i]) for i in range(len(x)))
        order = torch.arange(rows).flip(0)[: rows // 2 + 1]
        some = Matrix.codes(found, scale, rows=order, group=group)
        assert torch.allclose(some.linear(x), result[:, order], rtol=1e-5, atol=1e-4 * spread * cols)


def test_odd_codes_take_no_bit_more_than_their_halves(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    found = (2 * torch.randint(-8, 8, (16, 640), generator=draw) + 1).short()
    made = Matrix.codes(found, torch.ones(16))
    assert made.nbytes == 16 * 640 * 4 // 8 + beside(16, 640)


@pytest.mark.parametrize("code", [257, 301, -299, 32767])
def test_odd_codes_that_no_width_has(level: str, code: int) -> None:
    """A piece whose every code is apart is stored with a width all the same: a stored 0 is a code of 1."""
    found = torch.full((16, 64), code, dtype=torch.int16)
    made = Matrix.codes(found, torch.ones(16))
    assert torch.equal(made.row(3), found[3].float())
    assert torch.equal(made.linear(torch.ones(1, 64)), torch.full((1, 16), 64.0 * code))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_zeros_do_not_hide_inputs_that_are_no_numbers(level: str, bad: float) -> None:
    x = torch.ones(3, 200)
    x[1, 150] = bad
    for made in (
        Matrix.codes(torch.zeros(17, 200, dtype=torch.int16), torch.ones(17)),
        Matrix.dense(torch.zeros(17, 200, dtype=torch.int8), torch.ones(17)),
    ):
        found = made.linear(x)
        assert found[1].isnan().all() and not found[0].any() and not found[2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_come_out(level: str, bad: float) -> None:
    found = codes(9, 130, 3).abs() + 1
    made = Matrix.codes(found, torch.ones(9), torch.ones(130))
    for length in (1, 3, 40):
        x = numbers(length, 130)
        healthy = made.linear(x)
        x[length // 2, 77] = bad
        result, others = made.linear(x), torch.arange(length) != length // 2
        assert not torch.isfinite(result[length // 2]).any()
        assert torch.equal(result[others], healthy[others])


GOOD: dict[str, Any] = {"codes": torch.ones(2, 9, dtype=torch.int16), "scale": torch.ones(2)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "of another dtype": ({"codes": torch.ones(2, 9)}, "codes is torch.float32"),
    "of one dimension": ({"codes": GOOD["codes"][0]}, "codes is torch.int16"),
    "no rows stored": ({"codes": GOOD["codes"][:0], "scale": torch.ones(0)}, "at least one row"),
    "no columns stored": ({"codes": GOOD["codes"][:, :0]}, "at least one row and one column"),
    "too few scales": ({"scale": torch.ones(1)}, "as many scales"),
    "too many factors": ({"columns": torch.ones(10)}, "as many factors"),
    "scale of integers": ({"scale": torch.ones(2, dtype=torch.int32)}, "scale"),
    "a scale for half a piece": ({"scale": torch.ones(2, 1), "group": 16}, "for 16 columns.*multiples of 32"),
    "a scale for less than none": ({"scale": torch.ones(2, 1), "group": -32}, "for -32 columns"),
    "too few groups": ({"scale": torch.ones(2, 2), "group": 32}, "2 scales, expected 1"),
    "row too high": ({"rows": torch.tensor([0, 2])}, "row 2 of a matrix of 2 rows"),
    "row too low": ({"rows": torch.tensor([-1])}, "row -1 of a matrix of 2 rows"),
    "no rows": ({"rows": torch.tensor([], dtype=torch.int64)}, "no rows"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_codes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    assert torch.equal(Matrix.codes(**GOOD).row(1), torch.ones(9))
    with pytest.raises((ValueError, TypeError), match=message):
        Matrix.codes(**(GOOD | change))
