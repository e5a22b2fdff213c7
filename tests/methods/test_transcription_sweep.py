"""The transcriptions of the sweep and of the surgeon against each other and exhaustive search."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import NM, SEEDS, problem, random_keep
from transcription_linear import (
    conv1d,
    damped,
    dense_target,
    factor,
    magnitude_mask,
    magnitude_nm,
    obs_brute,
    obs_greedy,
    output_error,
    sparsegpt,
    sparsegpt_fixed,
    sparsegpt_nm,
)

# the sweep


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, damp=st.sampled_from([0.001, 0.01, 1.0]))
def test_factor_is_the_successive_inverses(seed: int, damp: float) -> None:
    H = problem(seed)[1]
    U, full = factor(H, damp), damped(H, damp)[0]
    np.testing.assert_array_equal(U, np.triu(U))
    for j in range(8):
        first = np.linalg.inv(full[j:, j:])[0]
        np.testing.assert_allclose(U[j, j:] * U[j, j], first, rtol=1e-6, atol=1e-9 * abs(first).max())


@pytest.mark.parametrize("blocksize", [3, 4, 128])
def test_sparsity_0_changes_only_dead_columns(blocksize: int) -> None:
    W, H = problem(1, rows=3)
    dead = [2, 5]
    H[dead], H[:, dead] = 0, 0
    new, keep = sparsegpt(W, H, 0.0, blocksize)
    assert keep.all() and (new[:, dead] == 0).all()
    np.testing.assert_array_equal(np.delete(new, dead, 1), np.delete(W, dead, 1))


def test_dead_columns_count_in_the_damping_and_are_the_first_to_go() -> None:
    W, H = problem(2, rows=3)
    H[2], H[:, 2] = 0, 0
    full, dead = damped(H, 0.1)
    assert dead.tolist() == [j == 2 for j in range(8)]
    amount = 0.1 * (np.trace(H) + 1) / 8
    np.testing.assert_allclose(full - H, np.diag([amount + (j == 2) for j in range(8)]), atol=1e-12 * amount)
    new, keep = sparsegpt(W, H, 3 / 24)
    assert np.array_equal(keep, np.arange(8)[None] != np.full((3, 1), 2)) and (new[:, 2] == 0).all()
    np.testing.assert_array_equal(np.delete(new, 2, 1), np.delete(W, 2, 1))  # removing zeros pushes nothing


@settings(deadline=None, max_examples=25)
@given(
    seed=SEEDS,
    share=st.floats(0, 1),
    blocksize=st.sampled_from([1, 3, 4, 128]),
    damp=st.sampled_from([0.0, 0.01]),
)
def test_a_diagonal_hessian_is_masking_alone(seed: int, share: float, blocksize: int, damp: float) -> None:
    """... by w^2 H_jj, block by block: exact counts, ties aside."""
    W, H = problem(seed)
    H = np.diag(np.diag(H))
    new, keep = sparsegpt(W, H, share, blocksize, damp)
    np.testing.assert_array_equal(new, np.where(keep, W, 0))
    score = W**2 * (np.diag(H) + damp * np.diag(H).mean())
    for start in range(0, 8, blocksize):
        block, kept = score[:, start : start + blocksize], keep[:, start : start + blocksize]
        assert (~kept).sum() == round(share * kept.size)
        assert kept.all() or not kept.any() or block[~kept].max() < block[kept].min()


def test_ties_in_a_block_go_by_flat_index() -> None:
    """All scores equal: a block loses its first rows first, not its first columns."""
    new, keep = sparsegpt(np.ones((3, 4)), np.eye(4), 0.5, blocksize=2, damp=0)
    block = np.array([[0, 0], [0, 1], [1, 1]], dtype=bool)
    assert np.array_equal(keep, np.hstack([block, block]))
    assert np.array_equal(new, keep.astype(float))


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, blocksize=st.sampled_from([1, 3, 128]))
def test_the_sweep_is_never_better_than_the_best_row_of_its_mask(seed: int, blocksize: int) -> None:
    W, H = problem(seed)
    new, keep = sparsegpt(W, H, 0.5, blocksize)
    full = damped(H)[0]
    for i in range(4):
        best, least = obs_brute(W[i], full, np.flatnonzero(~keep[i]))
        assert (best[~keep[i]] == 0).all()
        assert least <= output_error(W[i], new[i], full) * (1 + 1e-7) + 1e-12 * output_error(
            W[i], 0 * W[i], full
        )


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, count=st.integers(1, 7))
def test_the_sweep_is_the_best_row_where_all_removed_come_first(seed: int, count: int) -> None:
    W, H = problem(seed, rows=1)
    keep = np.arange(8)[None] >= count
    best, least = obs_brute(W[0], damped(H)[0], range(count))
    new = sparsegpt_fixed(W, H, keep, blocksize=3)
    np.testing.assert_allclose(new[0], best, rtol=1e-5, atol=1e-7 * abs(best).max())
    assert output_error(W, new, damped(H)[0]) == pytest.approx(least, rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, blocksize=st.sampled_from([1, 3, 128]))
def test_columns_after_the_last_removed_one_solve_their_equations(seed: int, blocksize: int) -> None:
    """(d H)_k = 0 right of a row's last removed column, d = w0 - w: no survivor there can lower the error any
    more. For the very last column this is w_k = w0_k + sum_{j<k} d_j H_jk / H_kk."""
    W, H = problem(seed)
    keep = random_keep(seed, W.shape)
    keep[:, 0], keep[:, -1] = False, True
    new, full = sparsegpt_fixed(W, H, keep, blocksize), damped(H)[0]
    for w0, w, kept in zip(W, new, keep, strict=True):
        d = w0 - w
        for k in range(np.flatnonzero(~kept)[-1] + 1, 8):
            assert abs(d @ full[:, k]) <= 1e-7 * (abs(d) @ abs(full[:, k]))
        assert w[-1] == pytest.approx(w0[-1] + d[:-1] @ full[:-1, -1] / full[-1, -1], rel=1e-5, abs=1e-7)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, column=st.integers(0, 7))
def test_one_removed_weight_is_at_most_as_bad_as_masking_it(seed: int, column: int) -> None:
    """w^2 / [H^-1]_pp of what is right of p, never above w^2 H_pp; where p is last they are equal."""
    W, H = problem(seed, rows=1)
    keep = np.arange(8)[None] != column
    full = damped(H)[0]
    swept = output_error(W, sparsegpt_fixed(W, H, keep), full)
    masked = output_error(W, W * keep, full)
    assert swept <= masked * (1 + 1e-9)
    assert swept == pytest.approx(
        W[0, column] ** 2 / np.linalg.inv(full[column:, column:])[0, 0] / 2, rel=1e-6
    )
    if column == 7:
        assert swept == pytest.approx(masked, rel=1e-9)


def test_a_sweep_can_be_worse_than_masking() -> None:
    """No bound beyond one weight a row: column 1 makes good for column 0 as if column 2 were to stay, and is
    not touched again when column 2 goes as well. 61.25 against 5."""
    X = np.array([[1.0, 2, -1], [-1, 2, -2], [-1, 1, -1]])
    H, W, keep = 2 * X @ X.T, np.array([[1.0, -2, -1]]), np.array([[False, True, False]])
    assert output_error(W, W * keep, H) == pytest.approx(5)
    assert output_error(W, sparsegpt_fixed(W, H, keep, damp=0), H) == pytest.approx(61.25)
    assert obs_brute(W[0], H, [0, 2])[1] <= 5


@pytest.mark.parametrize("seed", range(3))
def test_on_whole_matrices_the_sweep_pays(seed: int) -> None:
    """What a method that forgets to push, or pushes the wrong way, fails at once."""
    W, H = problem(seed, rows=16, columns=16)
    full = damped(H)[0]
    new, keep = sparsegpt(W, H, 0.5, blocksize=8)
    swept, masked = output_error(W, new, full), output_error(W, W * keep, full)
    least = sum(obs_brute(w, full, np.flatnonzero(~kept))[1] for w, kept in zip(W, keep, strict=True))
    magnitude = output_error(W, W * magnitude_mask(W, 0.5), full)
    assert least < swept < 0.9 * masked and masked < magnitude


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_blocks_of_one_column_are_single_steps_of_the_surgeon(seed: int) -> None:
    """Each column: the row of smallest w_p^2 / [H^-1]_pp takes the OBS step -w_p / [H^-1]_pp [H^-1]_:p, with
    H of the columns not yet settled, inverted anew. No factor, no blocks."""
    W, H = problem(seed)
    got, got_keep = sparsegpt(W, H, 0.25, blocksize=1)
    want, keep, full = W.copy(), np.ones(W.shape, dtype=bool), damped(H)[0]
    for p in range(8):
        inverse = np.linalg.inv(full[p:, p:])
        i = int(np.argmin(want[:, p] ** 2 / inverse[0, 0]))
        want[i, p:] -= want[i, p] / inverse[0, 0] * inverse[:, 0]
        want[i, p], keep[i, p] = 0, False
    assert np.array_equal(got_keep, keep)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7 * abs(want).max())


@pytest.mark.parametrize("n,m", NM)
def test_groups_are_chosen_when_the_sweep_reaches_them(n: int, m: int) -> None:
    """The same by hand, group after group; the block size does not matter."""
    W, H = problem(11, rows=3, columns=16)
    new, keep = sparsegpt_nm(W, H, n, m, blocksize=16)
    want, full = W.copy(), damped(H)[0]
    for start in range(0, 16, m):
        diagonal = [np.linalg.inv(full[p:, p:])[0, 0] for p in range(start, start + m)]
        score = want[:, start : start + m] ** 2 / diagonal
        gone = np.argsort(score, axis=1)[:, : m - n]
        for p in range(start, start + m):
            inverse = np.linalg.inv(full[p:, p:])
            for i in range(3):
                if p - start in gone[i]:
                    want[i, p:] -= want[i, p] / inverse[0, 0] * inverse[:, 0]
                    want[i, p] = 0
    np.testing.assert_allclose(new, want, rtol=1e-6, atol=1e-8)
    for blocksize in (m, 128):
        again, same = sparsegpt_nm(W, H, n, m, blocksize)
        assert np.array_equal(keep, same)
        np.testing.assert_allclose(again, new, rtol=1e-9, atol=1e-11)


def test_masks_are_chosen_from_current_weights() -> None:
    """The first block or group is what the dense weights say; later ones are not."""
    W, H = problem(6, rows=16, columns=16)
    score = abs(W) / np.diag(factor(H))
    stale = np.hstack([magnitude_mask(score[:, :8], 0.5), magnitude_mask(score[:, 8:], 0.5)])
    for keep, dense, first in (
        (sparsegpt(W, H, 0.5, blocksize=8)[1], stale, 8),
        (sparsegpt_nm(W, H, 2, 4)[1], magnitude_nm(score, 2, 4), 4),
    ):
        assert np.array_equal(keep[:, :first], dense[:, :first])
        assert not np.array_equal(keep[:, first:], dense[:, first:])


@pytest.mark.parametrize("columns,blocksize", [(10, 4), (8, 128), (9, 3)])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77, 1.0])
def test_each_block_loses_its_exact_count(columns: int, blocksize: int, sparsity: float) -> None:
    W, H = problem(3, rows=5, columns=columns)
    new, keep = sparsegpt(W, H, sparsity, blocksize)
    for start in range(0, columns, blocksize):
        block = keep[:, start : start + blocksize]
        assert (~block).sum() == round(sparsity * block.size)
    assert np.array_equal(new != 0, keep)


def test_arguments_are_not_written_to() -> None:
    W, H = problem(4)
    H[2], H[:, 2] = 0, 0
    before = W.copy(), H.copy()
    (
        sparsegpt(W, H, 0.5),
        sparsegpt_nm(W, H, 2, 4),
        conv1d(W[:, None, :4], np.stack([H[:4, :4] + np.eye(4)] * 4), 0.5),
    )
    obs_greedy(W[0], H + np.eye(8), 3), dense_target(W, H, H, 0.1)
    assert np.array_equal(W, before[0]) and np.array_equal(H, before[1])


# the surgeon


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, count=st.integers(0, 6))
def test_the_greedy_surgeon_reaches_the_best_row_of_its_mask(seed: int, count: int) -> None:
    """One weight at a time, yet exact for the mask it ends with; its first choice is the best single one."""
    W, H = problem(seed, rows=1, columns=6)
    full = damped(H)[0]
    w, removed, error = obs_greedy(W[0], full, count)
    best, least = obs_brute(W[0], full, removed)
    assert len(removed) == count and (w[removed] == 0).all()
    np.testing.assert_allclose(w, best, rtol=1e-5, atol=1e-7 * abs(W).max())
    assert error == pytest.approx(least, rel=1e-6, abs=1e-12)
    any_mask = min(obs_brute(W[0], full, mask)[1] for mask in combinations(range(6), count))
    assert any_mask <= error * (1 + 1e-7) + 1e-12
    if count == 1:
        assert error == pytest.approx(any_mask, rel=1e-9)


def test_the_surgeon_by_hand() -> None:
    """H = [[2, 1], [1, 2]], H^-1 = [[2, -1], [-1, 2]] / 3: of w = (1, 2) the first goes, 1 / (2/3) against
    4 / (2/3), at the cost of half of it, and the second becomes 2 + 1/2."""
    H, w = np.array([[2.0, 1], [1, 2]]), np.array([1.0, 2])
    for got, error in (obs_brute(w, H, [0]), obs_greedy(w, H, 1)[::2]):
        np.testing.assert_allclose(got, [0, 2.5])
        assert error == pytest.approx(0.75)
    np.testing.assert_allclose(sparsegpt(w[None], H, 0.5, damp=0)[0], [[0, 2.5]])
