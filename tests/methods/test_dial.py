"""Bits foretold from some rows against those of a whole sweep; the step that meets what is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import SEEDS, problem

from sparsessm.methods.dial import Curve, foretell, step
from sparsessm.methods.grids import Dial
from sparsessm.methods.hessian import factorise
from sparsessm.methods.levels import coded_bits
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import sweep


@pytest.mark.parametrize("size", [0.03, 0.2, 0.8, 1.5])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_some_rows_foretell_the_bits_of_all(size: float, spread: float) -> None:
    W, X = problem(1, 400, 96)
    weight, factor = torch.from_numpy(W), factorise(torch.from_numpy(X @ X.T / X.shape[1]))
    prices = torch.from_numpy(np.exp(spread * np.random.default_rng(0).standard_normal(400)))
    curve = foretell(weight, factor, torch.arange(96), prices, weight == 0)
    middle = float((weight / factor.pivots * prices.sqrt()[:, None]).square().mean().sqrt())
    rounding = Dial(size * middle).rounding(weight, factor.pivots, False, prices, False)
    sweep(weight, lambda now, part: now.abs(), Unstructured(), 0.0, factor, rounding=rounding)
    assert curve.at(size * middle) == pytest.approx(rounding.levels().coded().bits, rel=0.05)


def test_a_part_of_a_vocabulary_foretells_the_bits_of_all() -> None:
    """Few tokens occur, and an error in the rows of the others costs next to nothing."""
    W, X = problem(1, 50_000, 24)
    weight, factor = torch.from_numpy(W), factorise(torch.from_numpy(X @ X.T / X.shape[1]))
    prices = torch.from_numpy(np.random.default_rng(0).pareto(1.2, 50_000)) + 1e-6
    curve = foretell(weight, factor, torch.arange(24), prices, weight == 0)
    assert curve.entries == weight.numel()
    for size in (0.1, 0.5, 2.0):
        rounding = Dial(size).rounding(weight, factor.pivots, False, prices, False)
        sweep(weight, lambda now, part: now.abs(), Unstructured(), 0.0, factor, rounding=rounding)
        assert curve.at(size) == pytest.approx(rounding.levels().coded().bits, rel=0.02)


def test_rows_that_cost_nothing_take_no_bits() -> None:
    W, X = problem(1, 40, 16)
    weight, factor = torch.from_numpy(W), factorise(torch.from_numpy(X @ X.T / X.shape[1]))
    prices = torch.ones(40, dtype=torch.float64)
    prices[:20] = 0
    order = torch.arange(16)
    curve = foretell(weight, factor, order, prices, weight == 0)
    half = foretell(weight[20:], factor, order, prices[20:], weight[20:] == 0)
    assert curve.at(0.3) - curve.least == pytest.approx(half.at(0.3) - half.least, rel=0.1)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, share=st.floats(0, 1))
def test_the_step_gives_the_bits_that_are_asked_for(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    curves = []
    for entries in (1000, 50):
        steps = torch.from_numpy(np.exp(np.cumsum(rng.uniform(0.1, 1, 8)) + rng.normal()))
        bits = torch.from_numpy(entries * (1 + np.cumsum(rng.uniform(0.1, 1, 8))[::-1].copy()))
        curves.append(Curve(steps, bits, entries, entries))
    least = sum(float(curve.bits[-1]) for curve in curves)
    asked = least * 1.001 + share * 8000
    found = step(curves, asked)
    assert sum(curve.at(found) for curve in curves) == pytest.approx(asked, rel=1e-6)


def test_a_curve_beyond_its_ends() -> None:
    curve = Curve(torch.tensor([1.0, 4.0]).double(), torch.tensor([300.0, 100.0]).double(), 100, 100)
    assert curve.at(2.0) == pytest.approx(200)
    assert curve.at(0.25) == pytest.approx(500) and curve.at(1e9) == 100


def test_a_matrix_of_zeros_has_a_flat_curve() -> None:
    weight = torch.zeros(3, 8)
    curve = foretell(weight, factorise(torch.eye(8)), torch.arange(8), None, weight == 0)
    assert curve.at(0.1) == curve.at(10) == 8 * (3 + 8) + coded_bits(weight)
