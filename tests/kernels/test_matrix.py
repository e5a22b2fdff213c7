"""The runtime's matrices at every level, dense and packed, against sums in float64; and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import close, numbers, probe
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.checkpoint.encoding import encode
from sparsessm.kernels.matrix import BLOCK, Matrix, rounded
from sparsessm.runtime.weights import matrices, matrix

pytestmark = pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")
VALUES = [torch.float32, torch.bfloat16, torch.int8]
KINDS = [*VALUES, torch.float16]
COLUMNS = [1, 3, 63, 64, 65, 130, 769]
LENGTHS = [1, 2, 3, 4, 5, 15, 16, 31, 32, 33, 64, 65, 130]


def weight(rows: int, cols: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values; those that are not kept are exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, cols, generator=generator) < density
    values = torch.randn(rows, cols, generator=generator)
    if dtype == torch.int8:
        return torch.where(kept, (values * 50).clamp(-127, 127), 0.0).to(dtype)
    return torch.where(kept, values, 0.0).to(dtype)


def scale_of(rows: int, dtype: torch.dtype) -> Tensor | None:
    return numbers(rows, seed=9).abs() + 0.1 if dtype == torch.int8 else None


def pack(values: Tensor, scale: Tensor | None = None, rows: Tensor | None = None) -> Matrix:
    """By the words of docs/sparse-format.md, not by the code that writes it."""
    kept = values != 0
    mask = torch.zeros(len(values), -(-values.shape[1] // 8), dtype=torch.uint8)
    for row, column in kept.nonzero().tolist():
        mask[row, column // 8] |= 1 << (column % 8)
    return Matrix.packed(mask, values.shape[1], values[kept], scale, rows)


def exact(values: Tensor, scale: Tensor | None) -> Tensor:
    return values.double() if scale is None else values.double() * scale.double()[:, None]


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_products_of_every_shape(level: str, cols: int, dtype: torch.dtype) -> None:
    for case, density in enumerate((0, 0.01, 0.5, 0.97, 1)):
        rows = 1 + (case + cols) % 9
        values, scale = weight(rows, cols, density, dtype), scale_of(rows, dtype)
        weights, bias = exact(values, scale), numbers(rows, seed=3) if case % 2 else None
        packed, dense = pack(values, scale), Matrix.dense(values, scale)
        assert (packed.sparse, dense.sparse) == (True, False)
        for index in range(rows):
            row = values[index].float() * (1 if scale is None else scale[index])
            assert torch.equal(packed.row(index), row) and torch.equal(dense.row(index), row)
        wide = numbers(130, cols + 7, seed=case)
        for length in LENGTHS:
            x = wide[:length, 3 : 3 + cols]  # strided
            seen = x if scale is None else rounded(x)
            for made in (packed, dense):
                found = made.linear(x, bias)
                assert close(found, seen, weights, scale, bias), (level, density, length, made.sparse)
                if scale is None and length in (3, 33):
                    soft = made.linear(x, bias, softplus=True)
                    torch.testing.assert_close(soft, F.softplus(found), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_decoding_multiplies_as_the_definition(level: str, cols: int, dtype: torch.dtype) -> None:
    for rows in (1, 2, 3, 4, 5, 9):
        for density in (0.01, 0.5, 1):
            values, scale = weight(rows, cols, density, dtype, seed=rows), scale_of(rows, dtype)
            for made in (pack(values, scale), Matrix.dense(values, scale)):
                found, x = probe(made, numbers(rows, cols, seed=cols))
                x = x if scale is None else rounded(x)
                if scale is None:
                    assert close(found, x, exact(values, scale), scale)
                else:  # an input that the decoder rounds otherwise at a tie is one unit off
                    expected, unit = x @ exact(values, scale).float().T, x.abs().amax() / 127
                    room = unit * exact(values, scale).abs().amax(1).float() + 2e-3 + 1e-4 * expected.abs()
                    assert ((found - expected).abs() <= room).all()


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)], ids=str)
def test_n_of_m(level: str, pattern: tuple[int, int]) -> None:
    n, m = pattern
    values = numbers(7, 136)
    groups = values.view(7, -1, m)
    groups.scatter_(2, groups.abs().topk(m - n, dim=2, largest=False).indices, 0.0)
    for int8 in (False, True):
        found = encode("w", values, int8=int8, kind=f"{n}:{m}").bitmask()
        assert found.mask is not None
        made = Matrix.packed(found.mask, 136, found.values, found.scale)
        assert made.sparse
        assert made.nbytes == 8 * 3 * 8 + found.values.nbytes + 7 * 4 * int8  # masks of whole groups of rows
        for length in (1, 5, 40):
            x = numbers(length, 136, seed=length)
            seen = rounded(x) if int8 else x
            weights = found.decode(torch.float32).double()
            assert close(made.linear(x), seen, weights, found.scale)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_matrices_of_encoded_tensors_and_chosen_rows(level: str, dtype: torch.dtype) -> None:
    stock = torch.float32 if dtype == torch.int8 else dtype
    values = weight(23, 70, 0.5, stock)
    x = numbers(6, 70, seed=5)
    orders = [
        None,
        torch.arange(4, 11),
        torch.randperm(23),
        torch.tensor([3, 3, 0, 22, 3]),
        torch.tensor([7]),
    ]
    for kind in ("dense", "bitmask"):
        found = encode("w", values, kind=kind, int8=dtype == torch.int8)
        for order in orders:
            made = matrices(found, [order])[0]
            whole = found.decode(torch.float32)
            weights = whole if order is None else whole[order]
            scale = found.scale if order is None or found.scale is None else found.scale[order]
            assert made.sparse == (kind == "bitmask" and dtype != torch.float16)
            assert (made.rows, made.cols) == weights.shape
            assert close(made.linear(x), x if scale is None else rounded(x), weights.double(), scale)
            assert all(torch.equal(made.row(i), weights[i]) for i in range(made.rows))


def test_a_fill_other_than_zero_is_written_out(level: str) -> None:
    values = torch.where(numbers(9, 20) > 0, numbers(9, 20, seed=1), 38.0)
    found = encode("A_log", values, kind="bitmask", removed=(38.0,))
    assert found.removed == 38.0
    made, x = matrix(found), numbers(3, 20, seed=2)
    assert not made.sparse and close(made.linear(x), x, values.double(), None)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_threads_do_not_change_a_bit(level: str, dtype: torch.dtype) -> None:
    values, scale = weight(210, 400, 0.5, dtype), scale_of(210, dtype)
    for length in (3, 100):  # enough work that threads are used
        x, bias = numbers(length, 400), numbers(210, seed=1)
        for made in (pack(values, scale), Matrix.dense(values, scale)):
            if not made.sparse and length > 16:
                continue  # torch's
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(made.linear(x, bias))
            assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_a_row_of_inputs_gives_the_same_bits_alone(level: str, dtype: torch.dtype) -> None:
    several = 7 if level == "portable" else 15  # tokens from which lanes are spent on them
    for cols in (65, 200, 769):
        values, scale = weight(11, cols, 0.6, dtype), scale_of(11, dtype)
        x = numbers(31, cols)
        for made in (pack(values, scale), Matrix.dense(values, scale)):
            for length in {2, 3, 4, several, 31 if kernels.LEVEL.startswith("avx512") and made.sparse else 5}:
                together = made.linear(x[:length])
                for i in range(length):
                    assert torch.equal(made.linear(x[i : i + 1])[0], together[i]), (cols, length, i)
            found, _ = probe(made, x)
            for i in range(len(found)):
                assert torch.equal(probe(made, x[i : i + 1])[0][0], found[i])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_matrix_is_the_sum_that_it_stands_for(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    dtype, density = data.draw(st.sampled_from(VALUES)), data.draw(st.floats(0, 1))
    values, scale = weight(rows, cols, density, dtype, data.draw(st.integers(0, 99))), scale_of(rows, dtype)
    order = data.draw(st.none() | st.lists(st.integers(0, rows - 1), min_size=1, max_size=12))
    chosen = None if order is None else torch.tensor(order)
    made = pack(values, scale, chosen)
    weights = exact(values, scale)
    weights, scale = (
        (weights, scale) if chosen is None else (weights[chosen], scale if scale is None else scale[chosen])
    )
    x = numbers(data.draw(st.integers(1, 70)), cols, seed=7)
    seen = x if scale is None else rounded(x)
    before = kernels.LEVEL
    try:
        for level in kernels.LEVELS[1:]:
            kernels.LEVEL = level
            assert close(made.linear(x), seen, weights, scale)
    finally:
        kernels.LEVEL = before


def test_rounding_to_bytes() -> None:
    x = numbers(5, 150) * torch.tensor([1.0, 1e-20, 1e20, 1e-35, 0.0])[:, None]
    found = rounded(x)
    blocks, before = F.pad(found, (0, 42)).view(5, -1, BLOCK), F.pad(x, (0, 42)).view(5, -1, BLOCK)
    unit = before.abs().amax(2, keepdim=True) / 127
    assert not blocks[3:].any()  # all but zero is zero
    assert ((blocks - before).abs() <= 0.5001 * unit)[:3].all()
    whole = (blocks[:3] / unit[:3]).double()
    assert (whole - whole.round()).abs().max() < 1e-4 and whole.abs().max().round() == 127
    assert torch.equal(rounded(found[:3]), found[:3]) or (rounded(found[:3]) - found[:3]).abs().max() < 1e15


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_no_numbers_come_out(level: str, bad: float, dtype: torch.dtype) -> None:
    values, scale = weight(9, 130, 1, dtype), scale_of(9, dtype)
    values[values == 0] = 1
    for made in (pack(values, scale), Matrix.dense(values, scale)):
        for length in (1, 3, 40):
            x = numbers(length, 130)
            healthy = made.linear(x)
            x[length // 2, 77] = bad
            found = made.linear(x)
            assert not torch.isfinite(found[length // 2]).any()
            others = torch.arange(length) != length // 2
            assert torch.equal(found[others], healthy[others])
        x = numbers(9, 130)
        x[2, 5] = bad
        logits, _ = probe(made, x)
        assert not torch.isfinite(logits[2]).any() and torch.isfinite(logits[3]).all()


def test_inputs_that_are_all_but_zero(level: str) -> None:
    values, scale = weight(5, 64, 0.5, torch.int8), scale_of(5, torch.int8)
    x = torch.zeros(2, 64)
    x[0, 3], x[1, 4] = 1e-40, 1e-44
    for made in (pack(values, scale), Matrix.dense(values, scale)):
        assert not made.linear(x).any()


GOOD: dict[str, Any] = {
    "mask": torch.tensor([[0b101, 0], [0b10, 1]], dtype=torch.uint8),
    "cols": 9,
    "values": torch.tensor([1.0, 2, 3, 4]),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too few values": ({"values": torch.ones(3)}, "keeps 4 entries, there are 3"),
    "too many values": ({"values": torch.ones(5)}, "keeps 4 entries, there are 5"),
    "no values": ({"values": torch.ones(0)}, "keeps 4 entries, there are 0"),
    "padding": ({"mask": torch.tensor([[5, 0], [2, 2]], dtype=torch.uint8)}, "row 1 keeps columns beyond"),
    "wide mask": ({"cols": 8}, "do not fit 8 columns"),
    "narrow mask": ({"cols": 17}, "do not fit 17 columns"),
    "no columns": ({"cols": 0}, "do not fit 0 columns"),
    "negative": ({"cols": -9}, "do not fit -9 columns"),
    "huge": ({"cols": 2**63 - 1}, "do not fit"),
    "mask of another dtype": ({"mask": GOOD["mask"].to(torch.int8)}, "mask is torch.int8"),
    "mask of one dimension": ({"mask": GOOD["mask"][0]}, "mask is torch.uint8"),
    "no rows stored": ({"mask": GOOD["mask"][:0], "values": torch.ones(0)}, "at least one row"),
    "values of another dtype": ({"values": torch.ones(4).double()}, "values is torch.float64"),
    "half": ({"values": torch.ones(4).half()}, "values is torch.float16"),
    "values of two dimensions": ({"values": torch.ones(2, 2)}, "values is torch.float32"),
    "int8 without scale": ({"values": torch.ones(4, dtype=torch.int8)}, "one scale a row"),
    "scale without int8": ({"scale": torch.ones(2)}, "one scale a row"),
    "too few scales": ({"values": torch.ones(4, dtype=torch.int8), "scale": torch.ones(1)}, "as many scales"),
    "scale of two": ({"values": torch.ones(4, dtype=torch.int8), "scale": torch.ones(2, 1)}, "scale is"),
    "row too high": ({"rows": torch.tensor([0, 2])}, "row 2 of a matrix of 2 rows"),
    "row too low": ({"rows": torch.tensor([-1])}, "row -1 of a matrix of 2 rows"),
    "no rows": ({"rows": torch.tensor([], dtype=torch.int64)}, "no rows"),
    "rows of int32": ({"rows": torch.tensor([0], dtype=torch.int32)}, "rows is torch.int32"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_packed_matrix_that_does_not_fit_itself_is_refused(change: dict[str, Any], message: str) -> None:
    sound = Matrix.packed(**GOOD)
    assert torch.equal(sound.row(1), torch.tensor([0, 3.0, 0, 0, 0, 0, 0, 0, 4]))
    with pytest.raises(ValueError, match=message):
        Matrix.packed(**(GOOD | change))


def test_inputs_that_do_not_fit_are_refused() -> None:
    for made in (Matrix.packed(**GOOD), Matrix.dense(torch.ones(2, 9))):
        for x in (torch.ones(9), torch.ones(3, 8), torch.ones(3, 9).double(), torch.ones(1, 3, 9)):
            with pytest.raises(ValueError, match="x is"):
                made.linear(x)
        for bias in (torch.ones(3), torch.ones(2).half(), torch.ones(2, 1)):
            with pytest.raises(ValueError, match="bias is"):
                made.linear(torch.ones(1, 9), bias)
        for index in (-1, 2, 2**40):
            with pytest.raises(ValueError, match="no such row"):
                made.row(index)
        assert made.linear(torch.ones(0, 9)).shape == (0, 2)
        apart = torch.ones(9, 3).T  # columns that are not next to each other are copied
        assert torch.equal(made.linear(apart), made.linear(torch.ones(3, 9)))
        assert torch.equal(made.linear(torch.ones(1, 9).expand(3, -1)), made.linear(torch.ones(3, 9)))
    for values in (torch.ones(3), torch.ones(0, 3), torch.ones(3, 0), torch.ones(2, 2).half()):
        with pytest.raises(ValueError):
            Matrix.dense(values)


def test_what_a_matrix_was_made_of_may_change_later() -> None:
    values = torch.ones(3, 70)
    made, mask = Matrix.dense(values), GOOD["mask"].clone()
    packed = Matrix.packed(mask, 9, GOOD["values"])
    values.zero_()
    mask.zero_()
    assert made.row(2).sum() == 70 and packed.row(0).sum() == 3
    assert made.linear(torch.ones(20, 70)).sum() == 3 * 20 * 70
