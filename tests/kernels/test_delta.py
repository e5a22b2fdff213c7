"""The gated delta rule in chunks, against the plain rule in float64, matrix by matrix, on hostile shapes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from delta_rules import FORGETS, assert_close, inputs, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparsessm.kernels import reference
from sparsessm.kernels.delta import energies, gated_delta
from sparsessm.kernels.delta_chunked import delta_chunked


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(*(st.integers(1, most) for most in (2, 70, 3, 3, 9, 7))),
    st.booleans(),
    st.sampled_from([None, 1, 5, 16, 200]),
    st.integers(0, 99),
)
def test_hostile_shapes(shape: tuple[int, ...], channels: bool, chunk: int | None, seed: int) -> None:
    x = inputs(*shape, channels=channels, seed=seed)
    y, last, norms = plain(x)
    for rule in (lambda x: delta_chunked(*x, chunk=chunk), lambda x: reference.gated_delta(*x)):
        got, state = rule(x)
        assert_close(got, y, 1e-10)
        assert_close(state, last, 1e-10)
    squares, state = energies(*x[1:])
    assert_close(squares, norms, 1e-9)
    assert_close(state, last, 1e-10)
    single, state = delta_chunked(*(part.float() for part in x), chunk=chunk)
    assert single.dtype == state.dtype == torch.float32
    assert_close(single, y, 1e-3)  # betas near 2 with keys alike turn rounding into more


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("cut", [1, 16, 63])
def test_a_state_goes_on_where_it_stopped(channels: bool, cut: int) -> None:
    x = inputs(2, 100, 2, 2, 8, 5, channels=channels)
    want, last = gated_delta(*x)
    first, state = gated_delta(*(part[:, :cut] for part in x[:5]), x[5])
    second, state = gated_delta(*(part[:, cut:] for part in x[:5]), state)
    assert_close(torch.cat([first, second], 1), want, 1e-12)
    assert_close(state, last, 1e-12)


def test_no_steps_leave_the_state() -> None:
    x = inputs(1, 3, 1, 2, 4, 5, channels=False)
    y, state = gated_delta(*(part[:, :0] for part in x[:5]), x[5])
    assert y.shape == (1, 0, 2, 5) and torch.equal(state, x[5])
    assert not gated_delta(*(part[:, :0] for part in x[:5]))[1].any()


def test_a_memoryless_head_answers_with_what_it_is_told_alone() -> None:
    q, k, v, g, beta, state = inputs(2, 90, 2, 2, 6, 5, channels=False)
    y, _ = gated_delta(q, k, v, torch.full_like(g, FORGETS), beta, state)
    alone = (beta * (q * k).sum(-1).repeat_interleave(2, 2))[..., None] * v
    assert_close(y, alone, 1e-12)


def test_keys_that_repeat_overwrite() -> None:
    """With beta one, no decay and the same key the state holds the last value, whatever came before."""
    T = 200
    k = F.normalize(torch.ones(1, T, 1, 4), dim=-1)
    v = torch.randn(1, T, 1, 3, generator=torch.Generator().manual_seed(0))
    y, _ = gated_delta(k, k, v, torch.zeros(1, T, 1), torch.ones(1, T, 1))
    assert_close(y, v.double(), 1e-5)


@pytest.mark.parametrize("channels", [False, True])
def test_gradients(channels: bool) -> None:
    x = inputs(1, 7, 1, 2, 3, 2, channels=channels, seed=3)
    x[3] = x[3].clamp(min=-5)
    x = [part.requires_grad_() for part in x]
    assert torch.autograd.gradcheck(partial(delta_chunked, chunk=3), x)


def test_half_precision_is_computed_in_float32() -> None:
    x = inputs(1, 40, 1, 2, 8, 4, channels=False)
    low = [part.bfloat16() for part in x]
    y, state = gated_delta(*low)
    want, _ = gated_delta(*(part.double() for part in low))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(y, want, 1e-2)


@pytest.mark.parametrize(
    ("place", "shape", "told"),
    [
        (0, (2, 5, 3, 8), "4 heads do not divide into 3 groups of q and k"),
        (1, (2, 5, 2, 7), "k has shape"),
        (3, (2, 5, 2), "g has shape"),
        (3, (2, 5, 4, 7), "g has shape"),
        (4, (2, 4, 4), "beta has shape"),
        (5, (2, 4, 5, 8), "initial_state has shape"),
        (2, (2, 5, 4), "v "),
    ],
)
def test_what_does_not_fit_is_named(place: int, shape: tuple[int, ...], told: str) -> None:
    x = inputs(2, 5, 2, 2, 8, 5, channels=False)
    x[place] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=told):
        gated_delta(*x)


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk is 0; it must be at least 1"):
        delta_chunked(*inputs(1, 2, 1, 1, 2, 2, channels=False), chunk=0)
