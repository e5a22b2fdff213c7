"""Balanced truncation: the directions that stay lose the least, against brute force over random ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsessm.methods.balanced import balanced_truncation, energies
from sparsessm.methods.observers import StateSums

SEEDS = st.integers(0, 10_000)


def gram(draw: torch.Generator, groups: int, states: int, rank: int) -> Tensor:
    """(G, N, N) moments of correlated data of a rank, directions of very different size."""
    rows = torch.randn(groups, 5 * states, rank, generator=draw, dtype=torch.float64)
    rows *= 2.0 ** -torch.arange(rank).double().div(2)
    basis = torch.linalg.qr(torch.randn(groups, states, rank, generator=draw, dtype=torch.float64)).Q
    data = rows @ basis.mT
    return data.mT @ data


def sums_of(p: Tensor, q: Tensor) -> StateSums:
    return StateSums(torch.empty(0), torch.empty(0), p, q, None)


def lost(p: Tensor, q: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(G,): energy of C.h - C'.h' over data of these moments."""
    rest = torch.eye(p.shape[-1], dtype=torch.float64) - C.mT @ B
    return torch.einsum("gij,gjk,gkl,gil->g", q, rest, p, rest)


@given(seed=SEEDS, groups=st.integers(1, 3), states=st.integers(2, 7), scale=st.sampled_from([1, 1e-20, 1e9]))
@settings(deadline=None, max_examples=40)
def test_all_directions_are_all_of_the_output(seed: int, groups: int, states: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    p, q = gram(draw, groups, states, states) * scale, gram(draw, groups, states, states) / scale
    B, C = balanced_truncation(sums_of(p, q), states)
    assert B.shape == C.shape == (groups, states, states) and B.dtype == C.dtype == torch.float64
    h, c = torch.randn(2, 50, groups, states, generator=draw, dtype=torch.float64)
    seen = torch.einsum("grn,sgn->sgr", C, c) * torch.einsum("grn,sgn->sgr", B, h)
    torch.testing.assert_close(seen.sum(-1), (c * h).sum(-1), rtol=1e-6, atol=1e-6)


@given(seed=SEEDS, groups=st.integers(1, 3), states=st.integers(2, 7), data=st.data())
@settings(deadline=None, max_examples=40)
def test_no_directions_of_that_number_lose_less(
    seed: int, groups: int, states: int, data: st.DataObject
) -> None:
    """What is lost is the tail of the spectrum of P Q (Eckart-Young), which no other pair gets below."""
    r, draw = data.draw(st.integers(1, states - 1)), torch.Generator().manual_seed(seed)
    p, q = gram(draw, groups, states, states), gram(draw, groups, states, states)
    B, C = balanced_truncation(sums_of(p, q), r)
    assert B.shape == C.shape == (groups, r, states)
    squares = torch.linalg.eigvals(p @ q).real.sort(descending=True).values
    found, whole = lost(p, q, B, C), squares.sum(-1)
    torch.testing.assert_close(found / whole, squares[:, r:].sum(-1) / whole, rtol=1e-5, atol=1e-9)
    for size in (1e-3, 0.1, 10.0):
        noises = size * torch.randn(2, groups, r, states, generator=draw, dtype=torch.float64)
        near = lost(p, q, B + noises[0] * B.abs().mean(), C + noises[1] * C.abs().mean())
        assert (near >= found * (1 - 1e-9) - 1e-12 * whole).all()
        left = torch.linalg.qr(noises[0].mT).Q.mT
        assert (lost(p, q, left, left) >= found * (1 - 1e-9)).all(), "an orthogonal projection"
    for kept in (list(range(r)), list(range(states - r, states))):  # states as they are
        some = torch.eye(states, dtype=torch.float64)[kept].expand(groups, -1, -1)
        assert (lost(p, q, some, some) >= found * (1 - 1e-9)).all()


@given(seed=SEEDS, states=st.integers(2, 7), data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_directions_are_balanced(seed: int, states: int, data: st.DataObject) -> None:
    r, draw = data.draw(st.integers(1, states)), torch.Generator().manual_seed(seed)
    p, q = gram(draw, 2, states, states), gram(draw, 2, states, states)
    B, C = balanced_truncation(sums_of(p, q), r)
    values = torch.linalg.eigvals(p @ q).real.sort(descending=True).values[:, :r].sqrt()
    for found in (B @ p @ B.mT, C @ q @ C.mT):
        torch.testing.assert_close(
            found, torch.diag_embed(values), rtol=1e-5, atol=1e-6 * float(values.max())
        )


@given(seed=SEEDS, states=st.integers(2, 7), data=st.data())
@settings(deadline=None, max_examples=40)
def test_directions_that_are_not_there_cost_nothing(seed: int, states: int, data: st.DataObject) -> None:
    """P or Q of a rank below r, or zero."""
    r, draw = data.draw(st.integers(1, states)), torch.Generator().manual_seed(seed)
    ranks = data.draw(st.integers(0, states)), data.draw(st.integers(0, states))
    p, q = (gram(draw, 1, states, rank) for rank in ranks)
    B, C = balanced_truncation(sums_of(p, q), r)
    assert torch.isfinite(B).all() and torch.isfinite(C).all()
    squares = torch.linalg.eigvals(p @ q).real.sort(descending=True).values
    whole = float((p.diagonal(dim1=1, dim2=2).sum() * q.diagonal(dim1=1, dim2=2).sum()).clamp(min=1e-30))
    assert abs(float(lost(p, q, B, C) - squares[:, r:].sum())) <= 1e-7 * whole
    if min(ranks) <= r:
        assert float(lost(p, q, B, C)) <= 1e-7 * whole


def test_groups_are_apart() -> None:
    draw = torch.Generator().manual_seed(3)
    p, q = gram(draw, 4, 5, 5), gram(draw, 4, 5, 5)
    p[2] *= 1e12  # what is zero, one group says for itself
    B, C = balanced_truncation(sums_of(p, q), 3)
    for g in range(4):
        alone = balanced_truncation(sums_of(p[g : g + 1], q[g : g + 1]), 3)
        torch.testing.assert_close(C[g].mT @ B[g], (alone[1].mT @ alone[0])[0], rtol=1e-8, atol=1e-8)


@given(seed=SEEDS, groups=st.integers(1, 3), states=st.integers(2, 7))
@settings(deadline=None, max_examples=25)
def test_energies_are_the_spectrum_of_p_q_and_what_is_lost(seed: int, groups: int, states: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sums = sums_of(gram(draw, groups, states, states), gram(draw, groups, states, states))
    found = energies(sums)
    values = torch.linalg.eigvals(sums.states @ sums.readouts).real.sort(descending=True).values.sum(0)
    torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-9 * float(values.max()))
    for r in range(1, states):
        gone = lost(sums.states, sums.readouts, *balanced_truncation(sums, r)).sum()
        torch.testing.assert_close(gone, found[r:].sum(), rtol=1e-4, atol=1e-9 * float(values.sum()))
