"""Problems for sweeps and repairs of one matrix, methods run on them as the loop runs them, exact answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transcription_linear as paper
from hypothesis import strategies as st
from torch import Tensor

from sparsessm.methods import Rule, entry_methods
from sparsessm.methods.hessian import Factor, factorise
from sparsessm.methods.patterns import Pattern, parse
from sparsessm.methods.repair import sweep

METHODS = entry_methods()

SEEDS = st.integers(0, 2**31)
PAPERS = ["magnitude", "wanda", "sparsegpt"]
NM = ["1:4", "2:4", "4:8"]
Array = np.ndarray


def problem(seed: int, rows: int, columns: int, tokens: int | None = None) -> tuple[Array, Array]:
    """W (rows, columns) and X (columns, tokens): correlated inputs on different scales."""
    rng = np.random.default_rng(seed)
    tokens = 2 * (columns + 5) if tokens is None else tokens
    shared = rng.standard_normal((columns, 3)) @ rng.standard_normal((3, tokens))
    X = np.exp(0.5 * rng.standard_normal((columns, 1))) * (rng.standard_normal((columns, tokens)) + shared)
    return rng.standard_normal((rows, columns)), X


def rule_of(name: str, pattern: str | Pattern, sparsity: float = 0.5, **fields: Any) -> Rule:
    pattern = parse(pattern) if isinstance(pattern, str) else pattern
    return Rule(METHODS[name], pattern, sparsity, "zero", **fields)


def evidence(weight: Tensor, X: Array, rule: Rule) -> Any:
    """What the method's own observer sees, two windows in slabs of different lengths."""
    assert rule.method.watch is not None
    observer = rule.method.watch(weight, rule)
    tokens = torch.from_numpy(X.T.copy()).to(weight.dtype).unflatten(0, (2, -1))  # (W, T, in)
    cut = tokens.shape[1] // 3
    observer.add(tokens[:, :cut]), observer.add(tokens[:, cut:])
    return observer.result()


def run(
    W: Array, X: Array, rule: Rule, dtype: torch.dtype = torch.float64, **how: Any
) -> tuple[Array, Array]:
    """Weights and mask by a row of METHODS and the sweep, as pruning/entries.py puts them together."""
    weight = torch.from_numpy(W.copy()).to(dtype)
    before = weight.clone()
    seen = evidence(weight, X, rule) if rule.method.watch else None
    factor = None
    if rule.method.hessian:
        seen = factor = factorise(seen.gram.to(dtype))
    pruned, keep = sweep(
        weight,
        lambda now, columns: rule.method.score(now, seen, rule, columns),
        rule.pattern,
        rule.sparsity,
        factor,
        rule.method.width,
        by_row=rule.method.by_row,
        **how,
    )
    assert pruned.dtype == dtype and keep.dtype == torch.bool and pruned.is_contiguous()
    assert torch.equal(weight, before), "the weights given are left alone"
    assert not pruned[~keep].any()
    return pruned.numpy(), keep.numpy()


def assert_close(got: Array, want: Array, tolerance: float = 1e-9) -> None:
    assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


def depthwise(seed: int, rows: int, columns: int) -> tuple[Array, Array, Factor]:
    u = np.random.default_rng(seed).standard_normal((rows, 40)).cumsum(1)  # neighbours in time are alike
    u *= np.exp(np.random.default_rng(seed + 1).standard_normal((rows, 1)))
    H = paper.conv1d_hessians(u, columns)
    W = np.random.default_rng(seed + 2).standard_normal((rows, columns))
    return W, H, factorise(torch.from_numpy(H / 80))


def swept(W: Array, factor: Factor, rule: Rule, **how: Any) -> tuple[Array, Array]:
    weights, keep = sweep(
        torch.from_numpy(W),
        lambda now, columns: rule.method.score(now, factor, rule, columns),
        rule.pattern,
        rule.sparsity,
        factor,
        **how,
    )
    return weights.numpy(), keep.numpy()
