"""The repair on a grid: monotone, at rest only where no single change helps, least squares where it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import SEEDS, problem
from torch import Tensor

from sparsessm.methods import on_grid
from sparsessm.methods.grids import Dial, Rounding, Uniform, thrifty
from sparsessm.methods.hessian import Factor, factorise
from sparsessm.methods.levels import Levels
from sparsessm.methods.on_grid import Nearest, damped, descend, fit_factors, fit_groups, refit
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import output_error, sweep


def state(
    seed: int, grid: Uniform | Dial, share: float = 0.0, rows: int = 5, columns: int = 14
) -> tuple[Levels, Tensor, Tensor, Factor, Tensor, Rounding]:
    """levels, goal, gram, factor, keep, rounding, as the sweep leaves them."""
    W, X = problem(seed, rows, columns)
    goal, gram = torch.from_numpy(W), torch.from_numpy(X @ X.T / X.shape[1])
    factor = factorise(gram)
    prices = torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal(rows)))
    rounding = grid.rounding(goal, factor.pivots, share > 0, prices, False)
    keep = sweep(goal, lambda now, part: now.abs(), Unstructured(), share, factor, rounding=rounding)[1]
    return rounding.levels(), goal, gram, factor, keep, rounding


def distance(levels: Levels, goal: Tensor, hessian: Tensor, prices: Tensor | None = None) -> float:
    change = levels.values().double() - goal
    return output_error(change if prices is None else change * prices.sqrt()[:, None], hessian)


def nearest(grid: Uniform | Dial, rounding: Rounding) -> Nearest:
    """As the grid does, without thrift."""
    return (lambda values, cost, rows: values.round()) if isinstance(grid, Dial) else rounding.nearest


BLOCKS = Uniform(3, 7, blocks=True)  # as q4_0, of fewer codes
GRIDS = [Uniform(2, 4), Uniform(3, 5), Uniform(4), BLOCKS, Dial(0.3), Dial(1.5)]


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, grid=st.sampled_from(GRIDS), share=st.sampled_from([0.0, 0.4]), passes=st.integers(1, 3))
def test_descent_never_hurts_and_leaves_the_mask(seed: int, grid: Uniform, share: float, passes: int) -> None:
    levels, goal, gram, factor, keep, rounding = state(seed, grid, share)
    hessian = damped(gram, factor)
    got = descend(levels, goal, hessian, keep, nearest(grid, rounding), passes=passes)
    assert distance(got, goal, hessian) <= distance(levels, goal, hessian) * (1 + 1e-6)
    assert not got.codes[~keep].any()
    assert torch.equal(got.rows, levels.rows)


@pytest.mark.parametrize("grid", [Uniform(2, 4), Dial(0.8)])
def test_at_rest_no_single_code_can_be_better(grid: Uniform | Dial) -> None:
    levels, goal, gram, factor, keep, rounding = state(3, grid, 0.3)
    hessian = damped(gram, factor)
    levels = descend(levels, goal, hessian, keep, nearest(grid, rounding), passes=50)
    least = distance(levels, goal, hessian)
    codes = grid.alphabet(True, False) if isinstance(grid, Uniform) else None
    for i, j in keep.nonzero().tolist():
        was = int(levels.codes[i, j])
        for code in {was - 1, was + 1, -was} - {was}:
            if codes and (code == 0 or abs(code) > codes.most):
                continue
            other = Levels(**{**vars(levels), "codes": levels.codes.clone()})
            other.codes[i, j] = code
            assert distance(other, goal, hessian) >= least * (1 - 1e-9)


@pytest.mark.parametrize("thrift", [0.0, 0.1, 0.3])
def test_descent_weighs_error_against_bits(thrift: float) -> None:
    """Of a row: error + thrift x (row factor)^2 x bits never grows."""
    levels, goal, gram, factor, keep, _ = state(2, Dial(1.0))
    hessian = damped(gram, factor)
    assert levels.columns is not None
    costs = hessian.diagonal() * levels.columns.double().square()

    def total(now: Levels) -> Tensor:
        change = now.values().double() - goal
        sizes = torch.where(now.codes == 0, 1, 2 + now.codes.abs()).sum(1)
        return ((change @ hessian) * change).sum(1) + thrift * now.rows[:, 0].double().square() * sizes

    got = descend(levels, goal, hessian, keep, lambda x, cost, _: thrifty(x, thrift / cost), costs)
    assert (total(got) <= total(levels) * (1 + 1e-6)).all()


@pytest.mark.parametrize("grid", [Uniform(3, 5), BLOCKS, Dial(0.7)], ids=str)
def test_some_rows_at_a_time_come_out_as_all(grid: Uniform | Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, goal, gram, factor, keep, rounding = state(4, grid, rows=37)
    whole = refit(levels, goal, gram, factor, keep, rounding)
    monkeypatch.setattr(on_grid, "TOGETHER", 5)
    monkeypatch.setattr(on_grid, "MOST", 5 * 14 * 3)
    found = refit(levels, goal, gram, factor, keep, rounding)
    assert not torch.equal(whole.codes, levels.codes) and torch.equal(found.codes, whole.codes)
    assert torch.equal(found.rows, whole.rows) and torch.equal(found.scales(), whole.scales())


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, bits=st.integers(2, 5), group=st.sampled_from([3, 5, 7, 14]), blocks=st.booleans())
def test_scales_of_groups_are_least_squares(seed: int, bits: int, group: int, blocks: bool) -> None:
    levels, goal, gram, factor, _, _ = state(seed, Uniform(bits, group, blocks))
    hessian = damped(gram, factor)
    got = fit_groups(levels, goal, hessian)
    before, after = distance(levels, goal, hessian), distance(got, goal, hessian)
    assert after <= before + 1e-6 * output_error(goal, hessian)
    root = np.linalg.cholesky(hessian.numpy())
    for i in range(len(goal)):
        columns = np.zeros((14, got.rows.shape[1]))
        for g in range(columns.shape[1]):
            part = slice(g * group, (g + 1) * group)
            columns[part, g] = levels.codes[i, part]
        best = np.linalg.lstsq(root.T @ columns, root.T @ goal[i].numpy(), rcond=None)[0]
        old = levels.rows[i].double().numpy()
        if (best / old > 1 / 1.9).all() and (best / old < 1.9).all():
            np.testing.assert_allclose(got.rows[i].double().numpy(), best, rtol=2e-3)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, step=st.floats(0.05, 3))
def test_row_and_column_factors_never_hurt(seed: int, step: float) -> None:
    levels, goal, gram, factor, _, rounding = state(seed, Dial(step))
    hessian, prices = damped(gram, factor), rounding.prices
    got = fit_factors(levels, goal, hessian, prices)
    before, after = distance(levels, goal, hessian, prices), distance(got, goal, hessian, prices)
    assert after <= before * (1 + 1e-3) + 1e-6 * output_error(goal, hessian)
    assert torch.equal(got.codes, levels.codes)


@pytest.mark.parametrize("grid", [Uniform(3, 7), BLOCKS])
def test_what_is_on_the_grid_already_stays(grid: Uniform) -> None:
    levels, _, gram, factor, keep, rounding = state(4, grid)
    goal, hessian = levels.values().double(), damped(gram, factor)
    got = refit(levels, goal, gram, factor, keep, rounding)
    assert torch.equal(got.codes, levels.codes)
    torch.testing.assert_close(got.rows, levels.rows)
    assert distance(got, goal, hessian) <= 1e-6 * output_error(goal, hessian)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dead", [False, True])
def test_refit_takes_dead_inputs_and_empty_rows(grid: Uniform | Dial, dead: bool) -> None:
    W, X = problem(9, 4, 12)
    W[1] = 0
    if dead:
        X[[2, 7]] = 0
    goal, gram = torch.from_numpy(W), torch.from_numpy(X @ X.T / X.shape[1])
    factor = factorise(gram)
    rounding = grid.rounding(goal, factor.pivots, True, None, False)
    keep = sweep(goal, lambda now, part: now.abs(), Unstructured(), 0.4, factor, rounding=rounding)[1]
    got = refit(rounding.levels(), goal, gram, factor, keep, rounding)
    assert torch.isfinite(got.values()).all() and not got.codes[~keep].any()
