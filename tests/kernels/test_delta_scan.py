"""The native gated delta rule, its gradients and the norms of its states at every level, against the plain
rule and the chunks' autograd in float64."""

from __future__ import annotations

import pytest
import torch
from delta_rules import FORGETS, Inputs, assert_close, inputs, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import NATIVE_LEVELS
from torch import Tensor

from sparsessm import kernels
from sparsessm.kernels.delta import energies, gated_delta
from sparsessm.kernels.delta_chunked import delta_chunked

# Sequences, steps, groups, heads of one, channels of a key and of a value: below, at and behind a strip of
# columns, a block of steps and a vector of sums.
SHAPES = st.tuples(*(st.integers(1, most) for most in (2, 70, 2, 3, 37, 70)))


def single(x: Inputs) -> Inputs:
    return [part.float() for part in x]


def as_told(x: Inputs) -> Inputs:
    """In the precision that a kernel of float32 is given."""
    return [part.float().double() for part in x]


@pytest.mark.parametrize("name", NATIVE_LEVELS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(SHAPES, st.booleans(), st.integers(0, 99))
def test_every_level_on_hostile_shapes(name: str, shape: tuple[int, ...], channels: bool, seed: int) -> None:
    x = inputs(*shape, channels=channels, seed=seed)
    y, last, norms = plain(as_told(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LEVEL", name)
        got, state = gated_delta(*single(x))
        squares, behind = energies(*single(x)[1:])
    assert_close(got, y, 3e-6)
    assert_close(state, last, 3e-6)
    assert_close(squares, norms, 3e-6)
    assert torch.equal(state, behind)


def gradients(x: Inputs, rule: object, toward: tuple[Tensor, Tensor]) -> list[Tensor]:
    x = [part.requires_grad_() for part in x]
    outputs = rule(*x)  # pyright: ignore[reportCallIssue]
    loss = sum((out * to.to(out.dtype)).sum() for out, to in zip(outputs, toward, strict=True))
    return list(torch.autograd.grad(loss, x))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", NATIVE_LEVELS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(SHAPES, st.booleans(), st.integers(0, 99))
def test_gradients_of_every_level(name: str, shape: tuple[int, ...], channels: bool, seed: int) -> None:
    x = as_told(inputs(*shape, channels=channels, seed=seed))
    random = torch.Generator().manual_seed(seed)
    toward = tuple(torch.randn(x[i].shape, generator=random, dtype=torch.float64) for i in (2, 5))
    want = gradients([part.clone() for part in x], delta_chunked, toward)  # pyright: ignore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LEVEL", name)
        got = gradients(single(x), gated_delta, toward)  # pyright: ignore[reportArgumentType]
    for has, of in zip(got, want, strict=True):
        assert has.dtype == torch.float32
        assert_close(has, of, 5e-6)


def test_gradients_where_only_some_are_asked_for(level: str) -> None:
    x = single(inputs(1, 40, 1, 2, 6, 5, channels=False))
    y, last = gated_delta(*x[:2], x[2].requires_grad_(), *x[3:5])
    (from_y,) = torch.autograd.grad(y.sum(), x[2], retain_graph=True)
    (from_last,) = torch.autograd.grad(last.sum(), x[2], retain_graph=True)
    (both,) = torch.autograd.grad(y.sum() + last.sum(), x[2])
    assert from_y.any() and from_last.any()
    assert_close(both, (from_y + from_last).double(), 1e-5)
    assert not gated_delta(*(part.detach() for part in x))[0].requires_grad


@pytest.mark.parametrize("channels", [False, True])
def test_no_bit_depends_on_where_time_is_cut(level: str, channels: bool) -> None:
    x = single(inputs(2, 100, 2, 2, 8, 37, channels=channels))
    want, last = gated_delta(*x)
    squares, _ = energies(*x[1:])
    for cut in (1, 32, 63):
        first, middle = gated_delta(*(part[:, :cut] for part in x[:5]), x[5])
        second, end = gated_delta(*(part[:, cut:] for part in x[:5]), middle)
        assert torch.equal(torch.cat([first, second], 1), want) and torch.equal(end, last)
        later, _ = energies(*(part[:, cut:] for part in x[1:5]), middle)
        assert torch.equal(later, squares[:, cut:])


def test_no_bit_depends_on_the_number_of_threads(level: str) -> None:
    x = single(inputs(2, 150, 2, 3, 24, 50, channels=False))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(
            [
                *gated_delta(*x),
                *energies(*x[1:]),
                *gradients([p.clone() for p in x], gated_delta, (x[2], x[5])),
            ]
        )
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_views_are_read_as_they_lie(level: str) -> None:
    """Queries, keys and values as slices of one product; others are copied."""
    x = single(inputs(2, 20, 2, 2, 6, 5, channels=False))
    wide = torch.cat([part.flatten(2) for part in x[:3]], -1)
    q, k, v = (
        part.unflatten(-1, of.shape[2:]) for part, of in zip(wide.split([12, 12, 20], -1), x, strict=False)
    )
    turned = x[3].transpose(1, 2).contiguous().transpose(1, 2)
    for has, of in zip(gated_delta(q, k, v, turned, *x[4:]), gated_delta(*x), strict=True):
        assert torch.equal(has, of)


def test_a_memoryless_head_at_every_level(level: str) -> None:
    q, k, v, g, beta, state = single(inputs(2, 90, 2, 2, 6, 5, channels=False))
    y, _ = gated_delta(q, k, v, torch.full_like(g, FORGETS), beta, state)
    alone = (beta * (q * k).sum(-1).repeat_interleave(2, 2))[..., None] * v
    assert_close(y, alone.double(), 1e-6)


def test_no_steps(level: str) -> None:
    x = single(inputs(1, 3, 1, 2, 4, 5, channels=False))
    y, state = gated_delta(*(part[:, :0] for part in x[:5]), x[5])
    assert y.shape == (1, 0, 2, 5) and torch.equal(state, x[5])
    squares, state = energies(*(part[:, :0] for part in x[1:5]))
    assert squares.shape == (1, 0, 2) and not state.any()
    x = [part.requires_grad_() for part in x]
    _, last = gated_delta(*(part[:, :0] for part in x[:5]), x[5])
    assert torch.equal(torch.autograd.grad(last.sum(), x[5])[0], torch.ones_like(x[5]))
