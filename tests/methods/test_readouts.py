"""Readouts and inputs of states that stay, mixed by least squares over all products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import SEEDS, Array
from torch import Tensor

from sparsessm.methods.repair import readout, readout_error, remix


def states_and_readouts(seed: int, steps: int, channels: int, states: int) -> tuple[Array, Array]:
    """C (S, N) and h (S, D, N), states alike as neighbours are."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((states, 2))
    C = rng.standard_normal((steps, states)) + rng.standard_normal((steps, 2)) @ shared.T
    h = 0.5 * rng.standard_normal((steps, channels, states))
    return C, h + rng.standard_normal((steps, channels, 2)) @ shared.T


def full_sums(C: Array, h: Array, weight: Array) -> Tensor:
    """[n, n', m, m'] = sum C_n C_n' sum_d w_d h_dm h_dm', by loops."""
    states = C.shape[1]
    full = np.zeros([states] * 4)
    for s in range(len(C)):
        pairs = sum(weight[s, d] * np.outer(h[s, d], h[s, d]) for d in range(h.shape[1]))
        full += np.multiply.outer(np.outer(C[s], C[s]), pairs)
    return torch.from_numpy(full)


def products_of(C: Array, h: Array, weight: Array, kept: list[int]) -> tuple[Array, Array]:
    """The features (steps and channels, N r) and the output that they should restore, weighted."""
    rows, wanted = [], []
    for s in range(len(C)):
        for d in range(h.shape[1]):
            root = np.sqrt(weight[s, d])
            rows.append(root * np.outer(C[s], h[s, d, kept]).ravel())
            wanted.append(root * (C[s] @ h[s, d]))
    return np.array(rows), np.array(wanted)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, states=st.integers(1, 5), data=st.data())
def test_readouts_are_least_squares_over_all_products(seed: int, states: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, states - 1), min_size=1)))
    C, h = states_and_readouts(seed, 6 * states, 6, states)
    weight = np.random.default_rng(seed + 1).random((6 * states, 6)) ** 2
    keep = torch.zeros(states, dtype=torch.bool)
    keep[kept] = True
    full = full_sums(C, h, weight)
    features, wanted = products_of(C, h, weight, kept)
    best, *_ = np.linalg.lstsq(features, wanted, rcond=None)
    rest = np.square(wanted - features @ best).sum()
    for damping in (1e-10, 1e-4):
        mix = readout(full, keep, damping)
        assert mix.shape == (states, len(kept)) and mix.dtype == torch.float64
        error = np.square(wanted - features @ mix.numpy().ravel()).sum()
        measured = readout_error(full, keep, mix)
        assert abs(measured - error) <= 1e-8 * np.square(wanted).sum()
        assert rest <= error * (1 + 1e-9) + 1e-12
        start = np.eye(states)[:, kept].ravel()
        added = damping * np.square(features).sum(0).mean()
        # the damped problem as one plain least squares
        A = np.concatenate([features, np.sqrt(added) * np.eye(len(start))])
        damped, *_ = np.linalg.lstsq(A, np.concatenate([wanted, np.sqrt(added) * start]), rcond=None)
        np.testing.assert_allclose(mix.numpy().ravel(), damped, rtol=0, atol=2e-5)
        if damping == 1e-10:
            assert error <= rest + 1e-6 * np.square(wanted).sum()


def test_readouts_of_all_states_stay_as_they_are() -> None:
    C, h = states_and_readouts(0, 20, 4, 4)
    full, keep = full_sums(C, h, np.ones((20, 4))), torch.ones(4, dtype=torch.bool)
    mix = readout(full, keep)
    torch.testing.assert_close(mix, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert abs(readout_error(full, keep, mix)) < 1e-9 * float(torch.einsum("abab->", full))


def test_readouts_without_any_state_or_signal() -> None:
    C, h = states_and_readouts(0, 20, 4, 4)
    full = full_sums(C, h, np.ones((20, 4)))
    nothing = torch.zeros(4, dtype=torch.bool)
    mix = readout(full, nothing)
    assert mix.shape == (4, 0)
    whole = np.square((h @ C[:, :, None])[..., 0]).sum()
    assert readout_error(full, nothing, mix) == pytest.approx(float(whole))
    silent = readout(torch.zeros_like(full), torch.arange(4) < 2)
    torch.testing.assert_close(silent, torch.eye(4, dtype=torch.float64)[:, :2])


def ridge(features: Array, wanted: Array, start: Array, damping: float) -> Array:
    """The damped least squares as one plain one."""
    added = np.sqrt(damping * np.square(features).sum(0).mean())
    A = np.concatenate([features, added * np.eye(len(start))])
    return np.linalg.lstsq(A, np.concatenate([wanted, added * start]), rcond=None)[0]


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, states=st.integers(2, 4), rounds=st.integers(1, 3), data=st.data())
def test_inputs_and_readouts_in_turn_are_least_squares(
    seed: int, states: int, rounds: int, data: st.DataObject
) -> None:
    """h of each pair of a kept state's decay with any state's input, and of what goes, made up."""
    kept = sorted(data.draw(st.sets(st.integers(0, states - 1), min_size=1, max_size=states - 1)))
    gone = [n for n in range(states) if n not in kept]
    r, rng = len(kept), np.random.default_rng(seed)
    C, _ = states_and_readouts(seed, 12 * states, 5, states)
    h = rng.standard_normal((len(C), 5, r * states + len(gone))) + rng.standard_normal((len(C), 5, 1))
    pair = {k: i * states + k for i, k in enumerate(kept)} | {n: r * states + i for i, n in enumerate(gone)}
    wanted = sum(C[:, None, n] * h[:, :, pair[n]] for n in range(states)).ravel()
    full = np.einsum("sa,sb,sdp,sdq->abpq", C, C, h, h)
    keep = torch.zeros(states, dtype=torch.bool)
    keep[kept] = True
    start = torch.eye(states, dtype=torch.float64)[:, kept] + 0.1 * torch.from_numpy(
        rng.standard_normal((states, r))
    )
    write, read = remix(torch.from_numpy(full), keep, start, 1e-4, rounds)
    assert write.shape == (r, states) and read.shape == (states, r)
    M, Z, made = np.eye(states)[kept], start.numpy(), h[:, :, : r * states].reshape(len(C), 5, r, states)
    errors_ = []
    for _ in range(rounds):
        features = np.einsum("sk,sdkm->sdkm", C @ Z, made).reshape(len(wanted), -1)
        M = ridge(features, wanted, np.eye(states)[kept].ravel(), 1e-4).reshape(r, states)
        features = np.einsum("sn,sdkm,km->sdnk", C, made, M).reshape(len(wanted), -1)
        Z = ridge(features, wanted, np.eye(states)[:, kept].ravel(), 1e-4).reshape(states, r)
        errors_.append(np.square(wanted - features @ Z.ravel()).sum())
    scale = max(1.0, np.abs(M).max(), np.abs(Z).max())
    np.testing.assert_allclose(write.numpy(), M, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(read.numpy(), Z, rtol=0, atol=1e-5 * scale)
    assert errors_ == sorted(errors_, reverse=True) or errors_[-1] <= 1.01 * errors_[0]
