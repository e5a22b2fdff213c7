"""Rounding to the nearest, GPTQ and SparseGPT's joint form against transcriptions: every code and every
scale.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sweeps import METHODS, Array, evidence, problem, rule_of
from transcription_grids import gptq, rtn

from sparsessm.methods.grids import parse
from sparsessm.methods.hessian import factorise
from sparsessm.methods.levels import Levels
from sparsessm.methods.repair import sweep


def run(W: Array, X: Array, method: str, grid: str, sparsity: float = 0.0) -> tuple[Levels, Array]:
    """By a row of METHODS and the sweep, as pruning/entries.py puts them together; and the mask."""
    rule = rule_of(method, "unstructured", sparsity)
    row, weight = rule.method, torch.from_numpy(W.copy())
    factor = factorise(evidence(weight, X, rule).gram) if row.hessian else None
    rounding = parse(grid).rounding(weight, factor and factor.pivots, sparsity > 0, None, row.largest)
    values, keep = sweep(
        weight,
        lambda now, columns: row.score(now, factor, rule, columns),
        rule.pattern,
        sparsity,
        factor,
        row.width,
        rounding=rounding,
    )
    levels = rounding.levels()
    assert torch.equal(levels.values().double(), values)
    assert levels.rows.dtype == torch.float16
    return levels, keep.numpy()


def assert_same(levels: Levels, codes: Array, scales: Array) -> None:
    np.testing.assert_array_equal(levels.codes.numpy(), codes)
    np.testing.assert_array_equal(levels.rows.double().numpy(), scales)


@pytest.mark.parametrize("grid", ["int2:5", "int3:8", "int4", "int8:4"])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_to_the_nearest(seed: int, grid: str) -> None:
    W, X = problem(seed, 6, 21)
    W[2] = 0
    levels, keep = run(W, X, "rtn", grid)
    assert keep.all() and not levels.masked
    assert_same(levels, *rtn(W, parse(grid).bits, parse(grid).group))


@pytest.mark.parametrize("grid", ["int2:5", "int3:8", "int4", "int8:4"])
@pytest.mark.parametrize("columns", [21, 140])
def test_gptq(columns: int, grid: str) -> None:
    W, X = problem(columns, 6, columns)
    W[2] = 0
    levels, keep = run(W, X, "gptq", grid)
    assert keep.all()
    assert_same(levels, *gptq(W, 2 * X @ X.T, parse(grid).bits, parse(grid).group))


@pytest.mark.parametrize("grid", ["int3:16", "int4"])
def test_sparsegpt_masks_and_rounds_in_one_sweep(grid: str) -> None:
    W, X = problem(7, 8, 150)
    levels, keep = run(W, X, "sparsegpt", grid, 0.5)
    assert abs(keep.mean() - 0.5) < 0.01 and levels.masked
    assert not levels.codes.numpy()[~keep].any()
    assert_same(levels, *gptq(W, 2 * X @ X.T, parse(grid).bits, parse(grid).group, keep=keep))


def test_the_sweep_pays() -> None:
    """Against rounding alone, in the error of the output."""
    W, X = problem(5, 16, 64)
    H = X @ X.T
    errors = []
    for method in ("rtn", "gptq"):
        change = run(W, X, method, "int3:16")[0].values().double().numpy() - W
        errors.append(np.trace(change @ H @ change.T))
    assert errors[1] < 0.7 * errors[0]
    assert {name for name, row in METHODS.items() if "grid" in row.defaults} == {"rtn", "gptq"}
