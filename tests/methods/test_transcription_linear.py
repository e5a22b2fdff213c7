"""The transcriptions of the linear methods against exhaustive search and cases worked by hand: masks,
targets, allocations, conv1d."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import NM, SEEDS, inputs, problem
from transcription_linear import (
    conv1d,
    conv1d_hessians,
    dense_target,
    hessian_trace_ratios,
    magnitude_mask,
    magnitude_nm,
    outlier_ratio,
    output_error,
    owl_ratios,
    sparsegpt,
    sparsegpt_nm,
    wanda_mask,
    wanda_nm,
)

# masks


def test_magnitude_by_hand() -> None:
    W = np.array([[3.0, -1.0, 0.5, 1.0], [-0.5, 4.0, 1.0, -2.0]])
    # |W| sorted: 0.5 (2), 0.5 (4), 1 (1), 1 (3), 1 (6), ...; in brackets the flat index
    assert np.flatnonzero(~magnitude_mask(W, 0.25)).tolist() == [2, 4]
    assert np.flatnonzero(~magnitude_mask(W, 0.5)).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(~magnitude_nm(W, 1, 4)).tolist() == [1, 2, 3, 4, 6, 7]
    assert np.flatnonzero(~magnitude_nm(W, 2, 4)).tolist() == [1, 2, 4, 6]
    assert np.flatnonzero(~magnitude_nm(W, 1, 2)).tolist() == [1, 2, 4, 6]


def test_wanda_by_hand() -> None:
    W = np.array([[1.0, -2.0, 3.0, 4.0], [8.0, 2.0, -2.0, 2.0]])
    X = np.array([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [0.6, 0.8]])  # norms 5, 1, 2, 1
    # scores: 5 2 6 4 | 40 2 4 2
    assert np.flatnonzero(~wanda_mask(W, X, 0.25)).tolist() == [1, 5]
    assert np.flatnonzero(~wanda_mask(W, X, 0.5)).tolist() == [1, 3, 5, 7]
    assert np.flatnonzero(~wanda_nm(W, X, 1, 2)).tolist() == [1, 3, 5, 7]
    assert np.flatnonzero(~wanda_nm(W, X, 1, 4)).tolist() == [0, 1, 3, 5, 6, 7]


@settings(deadline=None, max_examples=40)
@given(
    W=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4).map(np.array),
    share=st.floats(0, 1),
)
def test_magnitude_removes_exactly_the_smallest_pairs_of_value_and_index(W: np.ndarray, share: float) -> None:
    """Integers: plenty of ties."""
    keep = magnitude_mask(W, share).flatten()
    pairs = [(abs(value), index) for index, value in enumerate(W.flatten())]
    gone = [pair for pair, kept in zip(pairs, keep, strict=True) if not kept]
    stay = [pair for pair, kept in zip(pairs, keep, strict=True) if kept]
    assert len(gone) == round(share * W.size)
    assert not gone or not stay or max(gone) < min(stay)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, share=st.floats(0, 1))
def test_wanda_is_one_row_of_sparsegpt_without_correlations(seed: int, share: float) -> None:
    """w^2 / U_jj^2 is w^2 2||x_j||^2 where H is its diagonal (Wanda, section 3)."""
    W, X = problem(seed, rows=3)[0], inputs(seed, 8)
    keep = wanda_mask(W, X, share)
    assert ((~keep).sum(1) == round(share * 8)).all()
    H = np.diag(2 * (X**2).sum(1))
    for i in range(3):
        assert np.array_equal(keep[i : i + 1], sparsegpt(W[i : i + 1], H, share, damp=0)[1])


@pytest.mark.parametrize("n,m", NM)
def test_n_of_m_are_kept(n: int, m: int) -> None:
    W, H = problem(5, rows=3, columns=16)
    new, keep = sparsegpt_nm(W, H, n, m)
    for mask in (magnitude_nm(W, n, m), wanda_nm(W, inputs(5, 16), n, m), keep):
        assert (mask.reshape(-1, m).sum(1) == n).all()
    assert (new[~keep] == 0).all() and (new[keep] != 0).all()


def test_n_of_m_refuses_what_does_not_divide() -> None:
    W, H = problem(0, rows=1, columns=6)
    for call in (lambda: magnitude_nm(W, 2, 4), lambda: sparsegpt_nm(W, H, 2, 4)):
        with pytest.raises(AssertionError, match="6 inputs are no multiple of 4"):
            call()
    with pytest.raises(AssertionError, match="a block of 3 columns cuts a group of 2"):
        sparsegpt_nm(W, H, 1, 2, blocksize=3)


# the target of the repair


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, damp=st.sampled_from([0.0, 0.01, 0.3]))
def test_dense_target_is_the_bottom_of_the_ridge(seed: int, damp: float) -> None:
    rng = np.random.default_rng(seed)
    W, X = rng.standard_normal((3, 5)), inputs(seed, 5)
    pruned = X + 0.3 * rng.standard_normal(X.shape) * abs(X).mean()
    H = pruned @ pruned.T
    amount = damp * np.trace(H) / 5

    def loss(V: np.ndarray) -> float:
        return float(((V @ pruned - W @ X) ** 2).sum() + amount * (V**2).sum())

    target = dense_target(W, X @ pruned.T, H, damp)
    for _ in range(10):
        step = rng.standard_normal(W.shape) * 0.05
        assert loss(target) < loss(target + step)
    np.testing.assert_allclose(dense_target(W, 2 * X @ pruned.T, 2 * H, damp), target, rtol=1e-7, atol=1e-10)
    if damp == 0:
        np.testing.assert_allclose(dense_target(W, H, H, 0), W, rtol=1e-5, atol=1e-7)


# allocation


def test_outlier_ratio_is_strict_and_relative_to_the_layer() -> None:
    scores = np.array([[1.0, 1, 1], [1, 1, 7]])  # mean 2
    assert outlier_ratio(scores, 3.5) == 0  # 7 > 7 is false
    assert outlier_ratio(scores, 3.4) == outlier_ratio(100 * scores, 3.4) == 1 / 6


def layers_with(outliers: list[int]) -> list[np.ndarray]:
    return [np.r_[np.full(count, 100.0), np.full(100 - count, 0.1)] for count in outliers]


def test_owl_by_hand() -> None:
    """D = 1, 5, 3 %: retention 0.3 - 0.08, 0.3 + 0.08, 0.3; the layer of most outliers keeps most."""
    np.testing.assert_allclose(owl_ratios(layers_with([1, 5, 3]), 5, 0.08, 0.7), [0.78, 0.62, 0.70])
    np.testing.assert_allclose(owl_ratios(layers_with([2, 2]), 5, 0.08, 0.7), [0.7, 0.7])
    # skewed: the width stays 2 lam, the mean p, and one layer is 1.5 lam away
    np.testing.assert_allclose(owl_ratios(layers_with([1, 1, 1, 3]), 5, 0.08, 0.7), [0.74, 0.74, 0.74, 0.58])


@settings(deadline=None, max_examples=25)
@given(
    outliers=st.lists(st.integers(0, 15), min_size=1, max_size=7),
    p=st.floats(0.3, 0.8),
    lam=st.floats(0, 0.1),
)
def test_owl_is_linear_in_the_outliers_around_p(outliers: list[int], p: float, lam: float) -> None:
    got = owl_ratios(layers_with(outliers), 5, lam, p)
    assert got.mean() == pytest.approx(p)
    if len(set(outliers)) > 1:
        assert got.max() - got.min() == pytest.approx(2 * lam)
        slope = 2 * lam / (max(outliers) - min(outliers))
        np.testing.assert_allclose(got - got[0], -slope * (np.array(outliers) - outliers[0]), atol=1e-12)


def test_hessian_trace_by_hand() -> None:
    diag = [np.array([3.0, 4]), np.array([1.0, 1, 1, 1]), np.array([2.0]), np.array([0.0, 3])]
    # sum of squares / columns: 12.5, 1, 4, 4.5 (without squares the last two change places)
    got = hessian_trace_ratios(diag, [2, 4, 1, 2], 0.5, 0.06)
    np.testing.assert_allclose(got, [0.44, 0.56, 0.52, 0.48])
    # columns count: the same traces over other widths turn the order round
    np.testing.assert_allclose(hessian_trace_ratios(diag[:2], [100, 1], 0.5, 0.06), [0.56, 0.44])
    np.testing.assert_allclose(hessian_trace_ratios(diag[:1], [2], 0.5, 0.06), [0.5])
    np.testing.assert_allclose(hessian_trace_ratios([diag[0]] * 3, [2] * 3, 0.5, 0.06), [0.56, 0.5, 0.44])


# conv1d


def test_conv1d_is_one_sweep_a_channel() -> None:
    rng = np.random.default_rng(0)
    weight, u = rng.standard_normal((5, 1, 4)), rng.standard_normal((5, 30)).cumsum(1)
    hessians = conv1d_hessians(u, 4)
    new, keep = conv1d(weight, hessians, 0.5)
    assert ((~keep).sum((1, 2)) == 2).all() and np.array_equal(new != 0, keep)
    for c in range(5):
        row, kept = sparsegpt(weight[c], hessians[c], 0.5)
        assert np.array_equal(new[c], row) and np.array_equal(keep[c], kept)
    flat, _ = conv1d(weight[:, 0], hessians, 0.5)
    assert np.array_equal(flat, new[:, 0])


def test_conv1d_error_is_the_error_of_the_convolution() -> None:
    """1/2 d H d' against a causal convolution run both ways: taps and lags are in torch's order."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    weight, u = rng.standard_normal((3, 1, 4)), rng.standard_normal((3, 20))
    hessians = conv1d_hessians(u, 4)
    new, _ = conv1d(weight, hessians, 0.5)

    def run(w: np.ndarray) -> np.ndarray:
        out = torch.nn.functional.conv1d(torch.from_numpy(u)[None], torch.from_numpy(w), padding=3, groups=3)
        return out[0, :, :20].numpy()

    measured = ((run(weight) - run(new)) ** 2).sum(1)
    for c in range(3):
        assert output_error(weight[c], new[c], hessians[c]) == pytest.approx(measured[c], rel=1e-9)
