"""Grids: what is stored gives the values exactly, bits are counted as a file would need them, rounding is to
the nearest, scales are the best."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import SEEDS

from sparsessm.kernels import entropy
from sparsessm.methods import grids
from sparsessm.methods.grids import (
    Alphabet,
    Dial,
    Uniform,
    best_scales,
    parse,
    thrift_of,
    thrifty,
)
from sparsessm.methods.levels import CLASS_BITS, MORE, Levels, as_factors, as_scales, row_bits

KINDS = ["whole", "odd", "nonzero", "gapped"]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dialled(codes: torch.Tensor) -> Levels:
    rows, columns = as_factors(normal(1, len(codes)).exp(), normal(2, codes.shape[1]).exp())
    return Levels(codes.short(), rows[:, None], columns, codes.shape[1], 0, True)


# What is stored.


@pytest.mark.parametrize("group", [1, 3, 4, 100])
def test_values_are_products_in_float32_in_the_documented_order(group: int) -> None:
    codes = (100 * normal(0, 5, 10)).round().short()
    rows = as_scales(normal(1, 5, -(-10 // group)).exp())
    columns = as_scales(normal(2, 10).exp())
    for levels in (
        Levels(codes, rows, None, group, 8, False),
        Levels(codes, rows, columns, group, 0, True),
    ):
        values = levels.values().numpy()
        for i in range(5):
            for j in range(10):
                value = np.float32(int(codes[i, j])) * np.float32(rows[i, j // group].item())
                if levels.columns is not None:
                    value = value * np.float32(columns[j].item())
                assert values[i, j] == value and values.dtype == np.float32
        torch.testing.assert_close(levels.scales() * codes, levels.values())


@pytest.mark.parametrize("size", [0.0, 0.4, 1.5, 30.0])
def test_bits_are_those_of_the_entropy_coder_and_of_the_factors(size: float) -> None:
    codes = (size * normal(0, 70, 90)).round().short()
    assert dialled(codes).coded().bits == entropy.size(codes.numpy()) + 8 * (70 + 90)


@pytest.mark.parametrize("size", [0.4, 1.5, 6.0])
def test_rows_foretell_their_bits(size: float) -> None:
    scales = size * normal(1, 900, 1).mul(0.6).exp()
    codes = (scales * normal(0, 900, 300)).round().short()
    assert float(row_bits(codes).sum()) == pytest.approx(entropy.size(codes.numpy()), rel=0.03)
    halves = torch.cat([row_bits(codes[:450]), row_bits(codes[450:])])
    torch.testing.assert_close(row_bits(codes), halves)


def test_bits_of_a_row_by_hand() -> None:
    rows = row_bits(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [-300, 5, 7, 9]]))
    ideal, kinds = torch.tensor([4.0, 0.0, 8.0]), torch.tensor([1.0, 0.0, 3.0])
    torch.testing.assert_close(rows, (ideal + kinds * 0.5 / np.log(2) + CLASS_BITS + 4 * MORE).double())
    codes = torch.tensor([[0, 1, 3], [0, 0, -1]], dtype=torch.int16)
    rows = torch.ones(2, 2, dtype=torch.float16)
    assert Levels(codes, rows, None, 2, 3, True).coded().bits == 6 + 3 * 3 + 4 * 16
    assert Levels(codes, rows, None, 2, 3, False).coded().bits == 3 * 6 + 4 * 16


def test_entropy_is_that_of_an_ideal_code() -> None:
    codes = torch.tensor([[0, 0, 1, 1], [-1, -1, 2, 2]], dtype=torch.int16)
    assert dialled(codes).entropy == 8 + 8 * 6
    assert dialled(torch.zeros(2, 4)).entropy == 8 * 6


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rows=st.floats(-5, 5), columns=st.floats(-5, 5), spread=st.floats(0, 1))
def test_factors_keep_their_products(seed: int, rows: float, columns: float, spread: float) -> None:
    left = (spread * normal(seed, 6) + rows).exp()
    right = (spread * normal(seed + 1, 5) + columns).exp()
    small, other = as_factors(left, right)
    assert small.dtype == other.dtype == torch.float16
    want = left[:, None] * right
    got = small.double()[:, None] * other.double()
    torch.testing.assert_close(got, want, rtol=0.13, atol=0)
    for factors in (small, other):
        assert not (factors.view(torch.int16) & 127).any() and (factors > 0).all()


# Rounding.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_nearest_code(kind: str, bits: int) -> None:
    alphabet = Alphabet(bits, kind)
    codes = {
        "whole": list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))),
        "odd": list(range(-(2**bits) + 1, 2**bits, 2)),
        "nonzero": [z for z in range(-(2 ** (bits - 1)), 2 ** (bits - 1) + 1) if z],
        "gapped": [z for z in range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if z],
    }[kind]
    assert len(codes) == 2**bits - (kind == "gapped") and alphabet.most == codes[-1]
    values = 2**bits * normal(bits, 500)
    got = alphabet.nearest(values)
    assert set(got.tolist()) <= set(codes)
    want = min_distance = (values[:, None] - torch.tensor(codes)).abs().amin(1)
    torch.testing.assert_close((values - got).abs(), min_distance if want is None else want)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, thrift=st.floats(0, 0.45))
def test_thrift_weighs_error_against_bits(seed: int, thrift: float) -> None:
    values = 4 * normal(seed, 200)
    codes = torch.arange(-30.0, 31, dtype=torch.float64)
    bits = torch.where(codes == 0, 1.0, 2 + codes.abs())
    costs = (values[:, None] - codes).square() + thrift * bits
    got = thrifty(values, thrift)
    cost = (values - got).square() + thrift * torch.where(got == 0, 1.0, 2 + got.abs())
    torch.testing.assert_close(cost, costs.amin(1))
    assert torch.equal(thrifty(values, 0.0), values.round())


def test_only_rows_of_small_values_are_thrifty() -> None:
    values = torch.cat([normal(0, 1, 64), 20 * normal(1, 1, 64), 0.1 * normal(2, 1, 64)])
    assert thrift_of(values).tolist() == [grids.THRIFT, 0.0, grids.THRIFT]


@pytest.mark.parametrize("kind", ["odd", "nonzero"])
@pytest.mark.parametrize("bits", [2, 4])
def test_scales_are_near_the_best_and_count_survivors_alone(kind: str, bits: int) -> None:
    weight, alphabet = normal(bits, 6, 64), Alphabet(bits, kind)
    keep = normal(3, 6, 64) > -0.3
    keep[5] = False
    costs = normal(4, 64).exp()

    def error(scale: torch.Tensor) -> torch.Tensor:
        values = alphabet.nearest(weight / scale[:, None]) * scale[:, None]
        return ((weight - values).square() * costs * keep).sum(1)

    found = best_scales(weight * keep, keep, costs, alphabet).double()
    tried = torch.linspace(0.02, 3, 3000, dtype=torch.float64)
    least = torch.stack([error(scale.expand(6)) for scale in tried]).amin(0)
    assert (error(found)[:5] <= 1.1 * least[:5]).all() and (found > 0).all()
    assert found[5] == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_zero_bin_of_the_dial_is_a_threshold_of_the_score(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no weight is made up for by another, what is zero is what F w^2 / U^2 < step^2 / 4 says."""
    monkeypatch.setattr(grids, "THRIFT", 0.0)
    weight, pivots = normal(seed, 5, 12), normal(seed + 1, 12).exp()
    prices = (3 * normal(seed + 2, 5)).exp()
    rounding = Dial(0.7).rounding(weight, pivots, False, prices, False)
    keep = torch.ones(5, dtype=torch.bool)
    values = torch.stack([rounding.round(weight[:, j], keep, j) for j in range(12)], 1)
    levels = rounding.levels()
    score = prices[:, None] * (weight / pivots).square()
    sure = (score / (0.7**2 / 4)).log().abs() > 0.3  # factors are rounded
    assert torch.equal((levels.codes == 0)[sure], (score < 0.7**2 / 4)[sure])
    torch.testing.assert_close(values.float(), levels.values())
    steps = 0.7 * pivots / prices[:, None].sqrt()
    assert ((weight - values).abs() <= 0.6 * torch.maximum(steps, weight.abs() * 2 / 1.02)).all()


@pytest.mark.parametrize("hostile", ["zero rows", "free rows", "huge", "tiny"])
def test_the_dial_takes_every_matrix(hostile: str) -> None:
    weight, prices = normal(0, 4, 8), normal(1, 4).exp()
    if hostile == "zero rows":
        weight[1:3] = 0
    if hostile == "free rows":
        prices[0] = 0
    weight = weight * {"huge": 1e20, "tiny": 1e-20}.get(hostile, 1.0)
    rounding = Dial(0.1 * float(weight.abs().max())).rounding(
        weight, torch.ones(8).double(), False, prices, False
    )
    for j in range(8):
        assert torch.isfinite(rounding.round(weight[:, j], torch.ones(4, dtype=torch.bool), j)).all()
    assert torch.isfinite(rounding.levels().values()).all() and rounding.levels().coded().bits > 0


# Words.


@pytest.mark.parametrize(
    ("word", "grid"),
    [("int4", Uniform(4)), ("int2:32", Uniform(2, 32)), ("int8", Uniform(8)), ("q4_0", grids.Q4_0)],
)
def test_words(word: str, grid: Uniform) -> None:
    assert parse(word) == grid and str(grid) == word


@pytest.mark.parametrize(
    "word",
    ["int1", "int9", "int4:1", "int4:0", "4", "int4:-64", "nf4", "", "int4:9999999", "q4_1", "q4_0:64"],
)
def test_words_that_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="allowed: int2 to int8"):
        parse(word)
