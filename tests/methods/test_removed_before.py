"""What was removed before goes first and counts: a second pruning of the same matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transcription_linear as paper
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import NM, PAPERS, SEEDS, Array, assert_close, evidence, problem, rule_of, run

from sparsessm.methods.hessian import factorise
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import sweep


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    before=st.floats(0, 1),
    sparsity=st.floats(0, 1),
    repaired=st.booleans(),
    width=st.integers(1, 20),
)
def test_what_is_gone_goes_first_and_counts(
    seed: int, before: float, sparsity: float, repaired: bool, width: int
) -> None:
    """The value stored for it does not matter, what stands there after a repair neither."""
    W, X = problem(seed, 4, 16)
    gone = np.random.default_rng(seed).random(W.shape) < before
    rule = rule_of("sparsegpt", "unstructured", sparsity)
    factor = factorise(evidence(torch.from_numpy(W), X, rule).gram)
    result, keep = sweep(
        torch.from_numpy(W),
        lambda now, columns: rule.method.score(now, factor, rule, columns),
        rule.pattern,
        sparsity,
        factor if repaired else None,
        width,
        gone=torch.from_numpy(gone),
    )
    blocksize = width if repaired else 16

    def choose(j: int, W: Array, U: Array) -> tuple[int, Array] | None:
        if j % blocksize:
            return None
        part = slice(j, min(j + blocksize, 16))
        score = np.where(gone, -1.0, W**2 / np.diag(U) ** 2)[:, part]
        order = np.argsort(score, axis=None, kind="stable")
        mask = np.ones(score.size, dtype=bool)
        mask[order[: max(round(sparsity * score.size), int(gone[:, part].sum()))]] = False
        return part.stop, mask.reshape(score.shape)

    want, mask = paper._sweep(W, 2 * X @ X.T, blocksize, 0.01, choose)
    if not repaired:
        mask = choose(0, W, paper.factor(2 * X @ X.T))[1]  # type: ignore[index]
        want = W * mask
    assert np.array_equal(keep.numpy(), mask)
    assert not keep.numpy()[gone].any()
    assert_close(result.numpy(), want, 1e-8)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("pattern", ["unstructured", *NM])
def test_pruning_twice(name: str, pattern: str) -> None:
    """What the first pruning removed stays removed, and the second share is that of the whole."""
    W, X = problem(10, 4, 136)
    once, first = run(W, X, rule_of(name, pattern, 0.3))
    again, second = run(once, X, rule_of(name, pattern, 0.5), gone=torch.from_numpy(~first))
    assert not second[~first].any()
    if pattern == "unstructured":
        assert (~second).sum() == round(0.5 * W.size) or name != "magnitude"
        assert abs((~second).mean() - 0.5) < 0.01
        assert second.sum() < first.sum()
    else:
        assert np.array_equal(second, first), "the groups are full already"
        assert np.array_equal(again, once)


def test_infinite_scores_of_what_is_gone() -> None:
    gone = torch.tensor([[False, True, False, True]])
    score = torch.tensor([[1.0, torch.inf, 3.0, 2.0]])
    _, keep = sweep(torch.ones(1, 4), lambda now, columns: score[:, columns], Unstructured(), 0.75, gone=gone)
    assert keep.tolist() == [[False, False, True, False]]
