"""The refit of what is left: towards exact least squares on the support, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transcription_linear as paper
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import SEEDS, Array, assert_close, depthwise, problem, rule_of, swept
from torch import Tensor

from sparsessm.methods.hessian import Factor, factorise
from sparsessm.methods.repair import output_error, refit, sweep


def state_before_refit(
    seed: int, rows: int, columns: int, share: float
) -> tuple[Tensor, Tensor, Tensor, Factor, Tensor]:
    """weight, goal, gram, factor, keep, as the sweep leaves them."""
    W, X = problem(seed, rows, columns)
    goal, gram = torch.from_numpy(W), torch.from_numpy(X @ X.T / X.shape[1])
    factor = factorise(gram)
    rule = rule_of("sparsegpt", "unstructured", share)
    weight, keep = sweep(
        goal, lambda now, part: rule.method.score(now, factor, rule, part), rule.pattern, share, factor
    )
    return weight, goal, gram, factor, keep


def distance(weight: Tensor, goal: Tensor, gram: Tensor, factor: Factor) -> float:
    return output_error(weight - goal, gram + torch.diag_embed(factor.added.expand(gram.shape[:-1])))


def exact(goal: Array, gram: Array, added: float, keep: Array) -> Array:
    """Masked least squares of each row, solved on its support."""
    damped = gram + added * np.eye(len(gram))
    rows = [
        paper.obs_brute(row, damped, np.flatnonzero(~kept).tolist())[0]
        for row, kept in zip(goal, keep, strict=True)
    ]
    return np.array(rows)


@settings(deadline=None, max_examples=30)
@given(
    seed=SEEDS, rows=st.integers(1, 5), columns=st.integers(1, 14), share=st.floats(0, 1), swept=st.booleans()
)
def test_many_steps_of_refit_are_exact_least_squares(
    seed: int, rows: int, columns: int, share: float, swept: bool
) -> None:
    weight, goal, gram, factor, keep = state_before_refit(seed, rows, columns, share)
    start = weight if swept else goal * keep
    got = refit(start, goal, gram, factor, keep, steps=200)
    assert not got[~keep].any()
    assert_close(got.numpy(), exact(goal.numpy(), gram.numpy(), float(factor.added), keep.numpy()), 1e-7)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, share=st.floats(0, 1), steps=st.integers(0, 12), single=st.booleans())
def test_refit_never_hurts(seed: int, share: float, steps: int, single: bool) -> None:
    weight, goal, gram, factor, keep = state_before_refit(seed, 4, 14, share)
    before = distance(weight, goal, gram, factor)
    dtype = torch.float32 if single else torch.float64
    cast = Factor(factor.upper.to(dtype), factor.damping, factor.added.to(dtype), factor.dead)
    got = refit(weight.to(dtype), goal.to(dtype), gram.to(dtype), cast, keep, steps).double()
    assert not got[~keep].any() and torch.isfinite(got).all()
    scale = output_error(goal, gram)
    assert distance(got, goal, gram, factor) <= before * (1 + 1e-9) + (1e-6 if single else 1e-14) * scale
    if steps == 0:
        assert torch.equal(got, weight.to(dtype).double())


def test_more_steps_are_better_and_the_usual_ones_most_of_it() -> None:
    weight, goal, gram, factor, keep = state_before_refit(0, 6, 60, 0.6)
    best = torch.from_numpy(exact(goal.numpy(), gram.numpy(), float(factor.added), keep.numpy()))
    errors = [distance(refit(weight, goal, gram, factor, keep, n), goal, gram, factor) for n in range(12)]
    assert all(more < fewer for fewer, more in zip(errors, errors[1:], strict=False))
    least = distance(best, goal, gram, factor)
    assert errors[0] > 1.01 * least
    usual = distance(refit(weight, goal, gram, factor, keep), goal, gram, factor)
    assert usual == errors[10] and usual - least < 0.1 * (errors[0] - least)


def test_refit_with_dead_inputs_and_nothing_to_repair() -> None:
    W, X = problem(3, 4, 12)
    X[[0, 5]] = 0
    goal, gram = torch.from_numpy(W), torch.from_numpy(X @ X.T / X.shape[1])
    factor, keep = factorise(gram), torch.from_numpy(np.random.default_rng(0).random(W.shape) < 0.5)
    got = refit(goal * keep, goal, gram, factor, keep, 100)
    assert torch.equal(got[:, [0, 5]], (goal * keep)[:, [0, 5]])
    assert_close(got.numpy(), exact(W, gram.numpy(), float(factor.added), keep.numpy()), 1e-8)
    everything = torch.ones_like(keep)
    assert torch.equal(refit(goal, goal, gram, factor, everything), goal)
    assert not refit(goal * 0, goal, gram, factor, ~everything).any()
    nothing = factorise(gram * 0)
    assert torch.equal(refit(goal * keep, goal, gram * 0, nothing, keep), goal * keep)


def test_refit_of_a_depthwise_layer() -> None:
    W, H, factor = depthwise(4, 9, 6)
    gram, goal = torch.from_numpy(H / 80), torch.from_numpy(W)
    weights, keep = swept(W, factor, rule_of("sparsegpt", "unstructured"))
    got = refit(torch.from_numpy(weights), goal, gram, factor, torch.from_numpy(keep), 50)
    for row in range(9):
        want = exact(W[row : row + 1], H[row] / 80, float(factor.added[row]), keep[row : row + 1])
        assert_close(got[row].numpy(), want[0], 1e-8)
    error = output_error(got - goal, gram)
    by_hand = sum(paper.output_error(W[row], got[row].numpy(), H[row] / 40) for row in range(9))
    assert error == pytest.approx(by_hand)


def test_output_error_is_the_energy_of_the_output() -> None:
    W, X = problem(11, 3, 6)
    gram = torch.from_numpy(X @ X.T / X.shape[1])
    assert output_error(torch.from_numpy(W), gram) == pytest.approx(((W @ X) ** 2).sum() / X.shape[1])
