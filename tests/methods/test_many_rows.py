"""A matrix of many rows is worked on in parts; each row comes out as if it had been all at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sweeps import problem

from sparsessm.methods import grids, on_grid, repair
from sparsessm.methods.grids import Dial
from sparsessm.methods.hessian import factorise
from sparsessm.methods.observers import Moments
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import dense_target, output_error


@pytest.mark.parametrize("rows", [1, 7, 8, 50])
def test_parts_of_rows_are_all_of_them(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, X = problem(3, rows, 12)
    gram = torch.from_numpy(X @ X.T / X.shape[1])
    cross = gram + 0.1 * torch.from_numpy(np.random.default_rng(0).standard_normal((12, 12)))
    weight, factor, seen = torch.from_numpy(W), factorise(gram), Moments(gram, cross)

    def both() -> tuple[torch.Tensor, float, torch.Tensor]:
        rounding = Dial(0.3).rounding(weight, factor.pivots, False, None, False)
        nearest = rounding.nearest(10 * weight[:, 0], 1.0, slice(None))
        return dense_target(weight, seen, factor), output_error(weight, gram), nearest

    target, error, nearest = both()
    for module in (grids, repair):
        monkeypatch.setattr(module, "MANY", 7)
    in_parts = both()
    torch.testing.assert_close(in_parts[0], target, rtol=1e-12, atol=1e-12)
    assert in_parts[1] == pytest.approx(error, rel=1e-12) and torch.equal(in_parts[2], nearest)


def test_columns_are_fitted_by_the_rows_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As well as by all of them, where few rows have nearly all of the price."""
    W, X = problem(5, 3000, 16)
    weight, gram = torch.from_numpy(W), torch.from_numpy(X @ X.T / X.shape[1])
    prices = torch.from_numpy(np.random.default_rng(0).pareto(0.6, 3000)) + 1e-9
    factor = factorise(gram)
    hessian = on_grid.damped(gram, factor)
    rounding = Dial(0.5 * float(prices.median().sqrt())).rounding(weight, factor.pivots, False, prices, False)
    repair.sweep(weight, lambda now, part: now.abs(), Unstructured(), 0.0, factor, rounding=rounding)
    levels = rounding.levels()

    def error(found: on_grid.Levels) -> float:
        change = found.values().double() - weight
        return float((((change @ hessian) * change).sum(1) * prices).sum())

    by_all = error(on_grid.fit_factors(levels, weight, hessian, prices))
    monkeypatch.setattr(on_grid, "MANY", 300)
    by_some = error(on_grid.fit_factors(levels, weight, hessian, prices))
    before = error(levels)
    assert by_all < before and by_some - by_all < 0.1 * (before - by_all)
