"""methods/structured.py: elimination against brute force, every selection against its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsessm.methods import structured, unit_methods
from sparsessm.methods.observers import Moments, StateSums
from sparsessm.methods.patterns import Structured
from sparsessm.methods.repair import readout, readout_error
from sparsessm.methods.structured import Reader, Units, eliminate, elimination, mixed_elimination

UNITS = unit_methods()

SEEDS = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def correlated(seed: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) inputs on different scales that share a few directions."""
    shared = draw(seed + 1, rows, 2) @ draw(seed + 2, 2, columns)
    return (draw(seed, rows, columns) + shared) * (0.7 * draw(seed + 3, columns)).exp()


def reader(
    seed: int, out: int, columns: Tensor, inputs: int, cost: bool = False, dtype: torch.dtype = torch.float64
) -> Reader:
    X = correlated(seed, 3 * inputs, inputs)
    weights = draw(seed + 9, out).square() if cost else None
    return Reader(draw(seed + 5, out, inputs).to(dtype), weights, Moments(X.mT @ X / len(X)), columns)


def damped(gram: Tensor) -> Tensor:
    """What methods/hessian.py factors, for inputs that are all alive."""
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def refitted(readers: list[Reader], gone: list[int]) -> float:
    """Weighted squared error of all readers without the columns of some units, the rest fitted anew."""
    total = 0.0
    for one in readers:
        H = damped(one.seen.gram)
        W = one.weight.double()
        columns = set(one.columns[gone].flatten().tolist())
        left = [j for j in range(W.shape[1]) if j not in columns]
        root = torch.linalg.cholesky(H)  # |root' (V - W)'|^2
        V = torch.zeros_like(W)
        if left:
            V[:, left] = torch.linalg.lstsq(root.mT[:, left], root.mT @ W.mT, driver="gelsd").solution.mT
        error = ((V - W) @ root).square().sum(1)
        total += float(error.sum() if one.prices is None else error @ one.prices)
    return total


def brute_force(readers: list[Reader], sizes: list[int], removing: int) -> tuple[list[int], list[float]]:
    """Units in the order in which greedy elimination takes them, with the total error after each."""
    owner = [axis for axis, size in enumerate(sizes) for _ in range(size)]
    gone: list[int] = []
    errors: list[float] = []
    while len(gone) < removing * len(sizes):
        full = {axis for axis in range(len(sizes)) if sum(owner[u] == axis for u in gone) == removing}
        costs = {
            unit: refitted(readers, [*gone, unit])
            for unit in range(len(owner))
            if unit not in gone and owner[unit] not in full
        }
        gone.append(min(costs, key=lambda unit: costs[unit]))
        errors.append(costs[gone[-1]])
    return gone, errors


def order_of(scores: Any) -> list[int]:
    flat = torch.cat(list(scores))
    count = int(torch.isfinite(flat).sum())
    found = flat.argsort()[:count].tolist()
    assert flat[found].tolist() == list(range(count)), "each step has one number"
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    width=st.integers(1, 3),
    out=st.integers(1, 4),
    two=st.booleans(),
    cost=st.booleans(),
    data=st.data(),
)
def test_elimination_equals_refitting_after_every_removal(
    seed: int, sizes: list[int], width: int, out: int, two: bool, cost: bool, data: st.DataObject
) -> None:
    """Every step takes the unit whose removal costs least after the best repair of all columns left."""
    units = sum(sizes)
    removing = data.draw(st.integers(1, min(sizes)))
    spare = data.draw(st.integers(0, 2))  # columns that belong to no unit
    places = np.random.default_rng(seed).permutation(units * width + spare)[: units * width]
    columns = torch.from_numpy(places).view(units, width)
    readers = [reader(seed, out, columns, units * width + spare, cost)]
    if two:  # each with columns of its own, as x_proj and out_proj have
        readers.append(
            reader(seed + 100, out + 1, torch.arange(units * 2).view(2, units).mT, units * 2, cost)
        )
    scores = eliminate(Units(sizes, removing, readers=readers))
    assert [len(score) for score in scores] == sizes
    assert all(int(torch.isfinite(score).sum()) == removing for score in scores), "each axis loses the same"
    want, errors = brute_force(readers, sizes, removing)
    got = order_of(scores)
    if got != want:  # ties up to rounding: the error of each step must be the same
        again = [refitted(readers, got[: step + 1]) for step in range(len(got))]
        np.testing.assert_allclose(again, errors, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("cost", [False, True])
def test_costs_are_those_of_the_best_refit(width: int, cost: bool) -> None:
    units = 5
    columns = torch.randperm(units * width, generator=torch.Generator().manual_seed(0)).view(units, width)
    one = reader(3, 4, columns, units * width, cost)
    weight = one.weight if one.prices is None else one.weight * one.prices.sqrt()[:, None]
    costs = structured._costs(weight, damped(one.seen.gram).inverse(), columns)
    want = [refitted([one], [unit]) for unit in range(units)]
    np.testing.assert_allclose(costs, want, rtol=1e-8)


def test_rows_that_cost_nothing_do_not_count() -> None:
    columns = torch.arange(6)[:, None]
    base = reader(1, 3, columns, 6)
    weight = base.weight.clone()
    weight[2] *= 100
    seen = base.seen
    cost = torch.tensor([1.0, 2.0, 0.0])
    got = eliminate(Units([6], 3, readers=[Reader(weight, cost, seen, columns)]))
    alone = eliminate(Units([6], 3, readers=[Reader(weight[:2], cost[:2], seen, columns)]))
    assert torch.equal(got[0], alone[0])
    flipped = eliminate(Units([6], 3, readers=[Reader(weight, cost.flip(0), seen, columns)]))
    assert not torch.equal(flipped[0], got[0])
    negative = eliminate(Units([6], 3, readers=[Reader(weight, cost - cost.eq(0) * 1e-9, seen, columns)]))
    assert torch.equal(negative[0], got[0]), "a cost below zero by rounding is zero"


def test_dead_inputs_go_first() -> None:
    X = correlated(4, 40, 8)
    X[:, [2, 5]] = 0.0
    columns = torch.arange(8).view(4, 2)[:, :1]  # units 0 2 4 6
    one = Reader(10 * draw(1, 3, 8), None, Moments(X.mT @ X / 40), columns)
    W = one.weight.clone()
    W[:, 2] = 0.0
    got = eliminate(Units([4], 2, readers=[Reader(W, None, one.seen, columns)]))
    assert order_of(got)[0] == 1


def test_units_that_are_copies_of_each_other_cost_next_to_nothing() -> None:
    """One of a pair of equal inputs goes first, then its partner is dear."""
    X = draw(0, 60, 6)
    X[:, 4] = X[:, 1]
    one = Reader(draw(1, 5, 6), None, Moments(X.mT @ X / 60), torch.arange(6)[:, None])
    first, *_ = order_of(eliminate(Units([6], 4, readers=[one])))
    assert first in (1, 4)
    scores = eliminate(Units([6], 5, readers=[one]))[0]
    assert max(scores[1], scores[4]) > 1, "the partner stays for a while"


@pytest.mark.parametrize("several", [2, 3, 5])
def test_many_units_go_several_at_a_time(several: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest few of one look, quotas respected; near what one at a time leaves."""
    sizes, removing = [8, 8, 8], 5
    columns = torch.arange(48).view(24, 2)
    readers = [reader(7, 6, columns, 48), reader(8, 3, columns, 48, cost=True)]
    slow = eliminate(Units(sizes, removing, readers=readers))
    monkeypatch.setattr(structured, "ROUNDS", 24 // several)
    fast = eliminate(Units(sizes, removing, readers=readers))
    assert all(int(torch.isfinite(score).sum()) == removing for score in fast)
    order = order_of(fast)
    costs = {unit: refitted(readers, [unit]) for unit in range(24)}
    assert order[:several] == sorted(costs, key=lambda unit: costs[unit])[:several]
    errors = [refitted(readers, order_of(scores)) for scores in (slow, fast)]
    assert errors[1] < 1.5 * errors[0]


def test_everything_may_go_and_nothing_may() -> None:
    columns = torch.arange(5)[:, None]
    one = reader(2, 2, columns, 5)
    assert sorted(order_of(eliminate(Units([5], 5, readers=[one])))) == [0, 1, 2, 3, 4]
    assert torch.isinf(eliminate(Units([5], 0, readers=[one]))[0]).all()


def test_elimination_leaves_what_it_was_given_alone() -> None:
    columns = torch.arange(6)[:, None]
    one = reader(1, 3, columns, 6, cost=True)
    weight, gram = one.weight.clone(), one.seen.gram.clone()
    eliminate(Units([6], 3, readers=[one]))
    assert torch.equal(one.weight, weight) and torch.equal(one.seen.gram, gram)
    single = Reader(weight.float(), one.prices, Moments(gram), columns)
    assert torch.equal(
        eliminate(Units([6], 3, readers=[single]))[0], eliminate(Units([6], 3, readers=[one]))[0]
    )


def test_weights_that_are_not_finite_are_refused() -> None:
    one = reader(1, 3, torch.arange(6)[:, None], 6)
    one.weight[:] = torch.nan
    with pytest.raises(ValueError, match="cost of removing a unit is not finite"):
        eliminate(Units([6], 2, readers=[one]))


# states


def scored(name: str, units: Units) -> Sequence[Tensor]:
    score = UNITS[name].score
    assert score is not None
    return score(units)


def state_sums(C: Tensor, h: Tensor, weight: Tensor | None = None) -> StateSums:
    """By the definitions: C (S, N), h (S, D, N), weight (S, D)."""
    w = torch.ones(h.shape[:2], dtype=h.dtype) if weight is None else weight
    pairs = torch.einsum("sd,sdn,sdm->snm", w, h, h)
    full = torch.einsum("sa,sb,smn->abmn", C, C, pairs)
    return StateSums(
        torch.einsum("sn,sm,snm->nm", C, C, pairs)[None],
        torch.einsum("sn,sdn->n", C**2, h**2)[None],
        pairs.sum(0)[None],
        (C.mT @ C)[None],
        full[None],
    )


def best_error(C: Tensor, h: Tensor, kept: list[int]) -> float:
    """Least squares of the output on all products of a readout with a kept state."""
    want = torch.einsum("sn,sdn->sd", C, h).flatten().numpy()
    if not kept:
        return float(want @ want)
    features = torch.einsum("sn,sdk->sdnk", C, h[:, :, kept]).flatten(2).flatten(0, 1).numpy()
    solution, *_ = np.linalg.lstsq(features, want, rcond=None)
    rest = want - features @ solution
    return float(rest @ rest)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, states=st.integers(2, 5), data=st.data())
def test_states_are_eliminated_greedily_by_what_readouts_cannot_restore(
    seed: int, states: int, data: st.DataObject
) -> None:
    removing = data.draw(st.integers(1, states - 1))
    C, h = correlated(seed, 9, states), correlated(seed + 50, 9 * 7, states).view(9, 7, states)
    full = state_sums(C, h).full
    assert full is not None
    scores = mixed_elimination(full[0], removing)
    assert int(torch.isfinite(scores).sum()) == removing
    order = scores.argsort()[:removing].tolist()
    assert scores[order].tolist() == list(range(removing))
    whole, kept = best_error(C, h, []), list(range(states))
    for state in order:
        errors = {n: best_error(C, h, [k for k in kept if k != n]) for n in kept}
        # damping leaves a little more than the least squares does
        assert errors[state] <= min(errors.values()) * 1.02 + 2e-3 * whole
        kept.remove(state)


def test_a_copy_of_a_state_is_the_first_to_go() -> None:
    C, h = draw(0, 12, 5), draw(1, 12, 6, 5)
    h[..., 3] = 2 * h[..., 1]
    sums = state_sums(C, h)
    assert sums.full is not None
    assert int(mixed_elimination(sums.full[0], 1).argmin()) in (1, 3)
    units = Units([5], 1, states=sums, mixable=True)
    assert int(scored("exact", units)[0].argmin()) in (1, 3)


def removal_error(C: Tensor, h: Tensor, weight: Tensor, gone: list[int]) -> float:
    """What is missing from the output when states go without any repair."""
    missing = torch.einsum("sn,sdn->sd", C[:, gone], h[:, :, gone])
    return float((weight * missing**2).sum())


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, states=st.integers(2, 6), data=st.data())
def test_states_whose_readouts_are_fixed(seed: int, states: int, data: st.DataObject) -> None:
    """Each step takes the state that adds least to the squared sum of all that went, two groups apart."""
    removing = data.draw(st.integers(1, states - 1))
    groups = []
    for group in range(2):
        C, h = (
            correlated(seed + group, 9, states),
            correlated(seed + 50 + group, 45, states).view(9, 5, states),
        )
        groups.append((C, h, draw(seed + 70 + group, 9, 5).square()))
    parts = [state_sums(*group) for group in groups]
    names = ("gram", "energy", "states", "readouts", "full")
    sums = StateSums(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
    for mixable, full in ((False, sums.full), (True, None)):
        some = StateSums(sums.gram, sums.energy, sums.states, sums.readouts, full)
        scores = scored("exact", Units([states, states], removing, states=some, mixable=mixable))
        for score, (C, h, weight) in zip(scores, groups, strict=True):
            gone: list[int] = []
            order = score.argsort()[:removing].tolist()
            for state in order:
                errors = {n: removal_error(C, h, weight, [*gone, n]) for n in range(states) if n not in gone}
                assert errors[state] <= min(errors.values()) * (1 + 1e-9) + 1e-12
                gone.append(state)


# the others


def test_ghost_is_the_root_of_the_energy_of_a_state_and_its_readout() -> None:
    energy = draw(0, 2, 5).square()
    scores = scored("ghost", Units([5, 5], 2, energy=energy))
    for score, own in zip(scores, energy, strict=True):
        np.testing.assert_allclose(score.square(), own)


def test_many_votes_go_first() -> None:
    votes = torch.tensor([5, 900, 0, 17])
    [score] = scored("sparsessm-vote", Units([4], 2, votes=votes))
    assert Structured().keep(score, 2).tolist() == [True, False, True, False]


def test_random_scores_are_those_of_the_layer_s_seed() -> None:
    score = UNITS["random"].score
    assert score is not None
    one, again, other = (score(Units([4, 4], 1, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], one[1])


def test_magnitude_is_a_norm_in_float64() -> None:
    score = UNITS["magnitude"].score
    assert score is not None
    weights = [torch.full((2, 3), 1e30), torch.tensor([[3.0, 4.0], [0.0, -6.0]])]
    first, second = score(Units([2, 2], 1, weights=weights))
    assert torch.isfinite(first).all() and second.tolist() == [25.0, 36.0]


@pytest.mark.parametrize("width", [1, 3])
def test_the_steps_of_an_elimination_add_up_to_what_all_of_them_cost(width: int) -> None:
    """Each step is exact after the repair of those before it, so the sum is one least squares."""
    columns = torch.arange(8 * width).view(8, width)
    readers = [reader(3, 7, columns, 8 * width, cost=True), reader(5, 4, columns, 8 * width)]
    for removing in (1, 4, 7):
        (scores,), steps = elimination(Units([8], removing, readers=readers))
        gone = scores.isfinite().nonzero()[:, 0].tolist()
        assert len(steps) == removing == len(gone)
        assert float(steps.sum()) == pytest.approx(refitted(readers, gone), rel=1e-6)


def test_the_table_says_what_each_selection_is_for() -> None:
    assert list(UNITS) == [
        "random",
        "magnitude",
        "sparsessm-vote",
        "ghost",
        "cosine",
        "balanced",
        "exact",
    ]
    for name, row in UNITS.items():
        assert row.name == name and set(row.looks) <= set(row.axes)
        assert row.score is not None or row.axes == ("block",) or row.projects
    assert UNITS["exact"].axes == UNITS["random"].axes == ("state", "channel", "head", "block")


@pytest.mark.parametrize("damping", [1e-9, 1e-4])
@pytest.mark.parametrize("states", [2, 4])
def test_the_error_of_a_readout_is_the_error_measured(states: int, damping: float) -> None:
    C, h = correlated(1, 11, states), correlated(2, 55, states).view(11, 5, states)
    full = state_sums(C, h).full
    assert full is not None
    keep = torch.arange(states) != 1
    mix = readout(full[0], keep, damping)
    want = torch.einsum("sn,sdn->sd", C, h)
    got = torch.einsum("sk,sdk->sd", C @ mix, h[:, :, keep])
    assert readout_error(full[0], keep, mix) == pytest.approx(float((want - got).square().sum()), rel=1e-6)
