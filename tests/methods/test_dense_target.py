"""The dense target: a layer brought near to its output in the dense model, by least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transcription_linear as paper
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import SEEDS, Array, assert_close, problem

from sparsessm.methods.hessian import factorise
from sparsessm.methods.observers import Moments
from sparsessm.methods.repair import dense_target


def streams(seed: int, rows: int, columns: int, tokens: int, dead: int = 0) -> tuple[Array, Array, Array]:
    """W, the inputs X in the dense model and those in the pruned one (columns, tokens)."""
    W, X = problem(seed, rows, columns, tokens)
    rng = np.random.default_rng(seed + 1)
    pruned = 0.8 * X + 0.3 * rng.standard_normal(X.shape) + 0.1 * rng.standard_normal((columns, columns)) @ X
    pruned[:dead] = 0
    return W, X, pruned


def moments(X: Array, pruned: Array) -> Moments:
    count = X.shape[1]
    return Moments(torch.from_numpy(pruned @ pruned.T / count), torch.from_numpy(X @ pruned.T / count))


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    tokens=st.integers(1, 40),
    damping=st.sampled_from([0.01, 0.5, 30.0]),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_dense_target_is_least_squares(
    seed: int, rows: int, columns: int, tokens: int, damping: float, strength: float
) -> None:
    """lstsq over the tokens and a pull towards W: ||V X~ - W X||^2 / tokens + added ||V - W||^2."""
    W, X, pruned = streams(seed, rows, columns, tokens)
    seen = moments(X, pruned)
    factor = factorise(seen.gram, damping)
    pull = float(factor.added) ** 0.5
    system = np.vstack([pruned.T / tokens**0.5, pull * np.eye(columns)])
    aim = np.vstack([X.T @ W.T / tokens**0.5, pull * W.T])
    best = np.linalg.lstsq(system, aim, rcond=None)[0].T
    got = dense_target(torch.from_numpy(W), seen, factor, strength).numpy()
    assert_close(got, W + strength * (best - W), 1e-7)


def test_dense_target_with_next_to_no_damping_is_the_published_solution() -> None:
    W, X, pruned = streams(0, 4, 10, 50)
    seen = moments(X, pruned)
    got = dense_target(torch.from_numpy(W), seen, factorise(seen.gram, 1e-11)).numpy()
    assert_close(got, paper.dense_target(W, X @ pruned.T, pruned @ pruned.T, 0.0), 1e-7)
    assert np.linalg.norm(got @ pruned - W @ X) < 0.9 * np.linalg.norm(W @ pruned - W @ X)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tokens", [7, 100])
def test_dense_target_changes_nothing_where_the_streams_are_the_same(
    dtype: torch.dtype, tolerance: float, tokens: int
) -> None:
    W, X, _ = streams(1, 5, 20, tokens)
    X[3] = 0
    gram = torch.from_numpy(X @ X.T / tokens).to(dtype)
    weight = torch.from_numpy(W).to(dtype)
    got = dense_target(weight, Moments(gram, gram.clone()), factorise(gram))
    assert got.dtype == dtype
    assert_close(got.numpy(), weight.numpy(), tolerance)


def test_dense_target_keeps_the_columns_of_dead_inputs() -> None:
    """Dead in the pruned model, alive in the dense one: the others make up for them."""
    W, X, pruned = streams(2, 4, 9, 60, dead=2)
    seen = moments(X, pruned)
    factor = factorise(seen.gram)
    got = dense_target(torch.from_numpy(W), seen, factor).numpy()
    assert np.array_equal(got[:, :2], W[:, :2])
    pull = float(factor.added) ** 0.5
    system = np.vstack([pruned[2:].T / 60**0.5, pull * np.eye(7)])
    aim = np.vstack([X.T @ W.T / 60**0.5, pull * W[:, 2:].T])
    assert_close(got[:, 2:], np.linalg.lstsq(system, aim, rcond=None)[0].T)


def test_dense_target_of_a_depthwise_layer() -> None:
    rng = np.random.default_rng(0)
    X, pruned = rng.standard_normal((2, 5, 4, 30))  # (channels, taps, tokens)
    W = rng.standard_normal((5, 4))
    pruned += X
    pruned[1, 0] = 0
    gram, cross = (torch.from_numpy(a @ pruned.swapaxes(1, 2) / 30) for a in (pruned, X))
    factor = factorise(gram)
    got = dense_target(torch.from_numpy(W), Moments(gram, cross), factor, 0.7)
    for row in range(5):
        alone = factorise(gram[row])
        want = dense_target(torch.from_numpy(W[row : row + 1]), Moments(gram[row], cross[row]), alone, 0.7)
        assert_close(got[row].numpy(), want[0].numpy())


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fewer", [1, 4])
def test_a_dense_target_with_fewer_inputs(strength: float, fewer: int) -> None:
    """argmin |V X~ - W X|^2 / n + added |V - start|^2 as one least squares; W has inputs that V has not."""
    W, X = problem(0, 5, 8)
    other = X[fewer:] + 0.1 * problem(1, 5, 8)[1][fewer:]
    count = X.shape[1]
    start = W[:, fewer:] + 0.1
    seen = Moments(torch.from_numpy(other @ other.T / count), torch.from_numpy(X @ other.T / count))
    factor = factorise(seen.gram)
    got = dense_target(torch.from_numpy(W), seen, factor, strength, start=torch.from_numpy(start))
    root = np.sqrt(float(factor.added) * count) * np.eye(8 - fewer)
    A = np.concatenate([other.T, root])
    best, *_ = np.linalg.lstsq(A, np.concatenate([X.T @ W.T, root @ start.T]), rcond=None)
    np.testing.assert_allclose(got.numpy(), start + strength * (best.T - start), rtol=0, atol=1e-8)


def test_a_dense_target_keeps_the_start_of_dead_inputs() -> None:
    W, X = problem(0, 3, 6)
    other = X[2:].copy()
    other[1] = 0.0
    seen = Moments(torch.from_numpy(other @ other.T), torch.from_numpy(X @ other.T))
    start = torch.from_numpy(W[:, 2:])
    got = dense_target(torch.from_numpy(W), seen, factorise(seen.gram), start=start)
    assert torch.equal(got[:, 1], start[:, 1]) and not torch.allclose(got, start)
