"""kernels/chunked.py against the recurrence it stands for, in float64, on hostile shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels.chunked import ssd_chunked

MEMORYLESS = -3e16
# windows, length, heads, channels, groups, states, chunk
SHAPES = [
    (1, 1, 1, 1, 1, 1, 64),
    (2, 37, 4, 3, 2, 5, 8),
    (3, 64, 2, 8, 1, 16, 16),
    (1, 65, 6, 1, 3, 7, 64),
    (2, 9, 3, 5, 3, 1, 4),
    (1, 130, 4, 2, 1, 4, 1),
    (2, 7, 2, 4, 1, 3, 64),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, initial_state; the last head of several is memoryless."""
    windows, length, heads, channels, groups, states, _ = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    A = -torch.exp(normal(heads))
    if heads > 1:
        A[-1] = MEMORYLESS
    drawn = [
        normal(windows, length, heads, channels),
        F.softplus(2 * normal(windows, length, heads) - 2),
        A,
        normal(windows, length, groups, states),
        normal(windows, length, groups, states),
        normal(heads),
        normal(windows, heads, channels, states),
    ]
    return [x.to(dtype) for x in drawn]


def recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, one step after another."""
    ratio = u.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(ratio, 2), C.repeat_interleave(ratio, 2)
    outputs = []
    for t in range(u.shape[1]):
        fed = (delta[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None, :]
        state = torch.exp(delta[:, t] * A)[..., None, None] * state + fed
        outputs.append((state * C[:, t, :, None, :]).sum(-1) + D[:, None] * u[:, t])
    return torch.stack(outputs, 1), state


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_is_the_recurrence(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x = inputs(shape, dtype)
    y, last = ssd_chunked(*x, chunk=shape[-1])
    want_y, want_last = recurrence(*(t.double() for t in x))
    assert y.dtype == dtype
    assert_close(y, want_y, tolerance)
    assert_close(last, want_last, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_gradients_are_those_of_the_recurrence(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    found = []
    weights = torch.Generator().manual_seed(1)
    mine = [x.requires_grad_() for x in inputs(shape, dtype)]
    plain = [x.detach().double().requires_grad_() for x in mine]
    results = [*ssd_chunked(*mine, chunk=shape[-1])], [*recurrence(*plain)]
    kinds = [torch.randn(x.shape, generator=weights, dtype=torch.float64) for x in results[1]]
    for tensors, outputs in zip((mine, plain), results, strict=True):
        total = sum((y.double() * w).sum() for y, w in zip(outputs, kinds, strict=True))
        found.append(torch.autograd.grad(total, tensors))
    for got, want in zip(*found, strict=True):
        assert got.isfinite().all()
        assert_close(got, want, tolerance)


def test_defaults_are_zero() -> None:
    u, delta, A, B, C, D, state = inputs((2, 37, 4, 3, 2, 5, 8))
    y, last = ssd_chunked(u, delta, A, B, C)
    want_y, want_last = recurrence(u, delta, A, B, C, torch.zeros_like(D), torch.zeros_like(state))
    assert_close(y, want_y, 1e-12)
    assert_close(last, want_last, 1e-12)


@pytest.mark.parametrize("cut", [0, 1, 8, 13])
def test_two_slabs_are_one_pass(cut: int) -> None:
    u, delta, A, B, C, D, state = inputs((2, 37, 4, 3, 2, 5, 8))
    whole, want = ssd_chunked(u, delta, A, B, C, D, state, chunk=8)
    first, state = ssd_chunked(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, state, chunk=8)
    second, last = ssd_chunked(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, state, chunk=8)
    assert_close(torch.cat([first, second], 1), whole, 1e-12)
    assert_close(last, want, 1e-12)


def test_a_small_step_counts_after_a_memoryless_head_s_large_one() -> None:
    """In float32 the sum of steps stays where the large one took it: the head would keep what it must not."""
    u, _, A, B, C, D, _ = inputs((1, 64, 2, 3, 1, 4, 64), torch.float32)
    delta = torch.full((1, 64, 2), 1e-8)
    delta[:, 0] = 30.0
    y, last = ssd_chunked(u, delta, A, B, C, D)
    assert A[-1] == MEMORYLESS
    scores = (B * C).sum(-1, keepdim=True)  # no memory: h_t is what step t feeds
    assert_close(y[:, :, 1], (u[:, :, 1] * (delta[:, :, 1:] * scores[:, :, 0] + D[1])).double(), 1e-5)
    assert_close(last[:, 1], (1e-8 * u[:, -1, 1, :, None] * B[:, -1]).double(), 1e-5)


def test_a_memoryless_head_s_steps_get_the_gradient_of_what_they_feed() -> None:
    """Anything left of a difference that is zero would be multiplied by -3e16."""
    x = [t.requires_grad_() for t in inputs((2, 70, 2, 8, 1, 16, 64), torch.float32)]
    ssd_chunked(*x)[0].square().sum().backward()
    grad = x[1].grad
    assert grad is not None
    assert grad.abs().max() < 1e6


def test_bfloat16_operands_stay_near() -> None:
    u, delta, A, B, C, D, state = inputs((2, 100, 4, 16, 2, 16, 32), torch.float32)
    low = u.bfloat16(), delta, A, B.bfloat16(), C.bfloat16(), D, state
    y, last = ssd_chunked(*low, chunk=32)
    want_y, want_last = recurrence(*(t.double() for t in low))
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    for got, want in ((y, want_y), (last, want_last)):
        assert (got.double() - want).norm() < 0.01 * want.norm()


def test_wrong_shapes_are_refused_by_name() -> None:
    u, delta, A, B, C, D, state = inputs((2, 9, 4, 3, 2, 5, 8))
    with pytest.raises(ValueError, match="expected \\(W, L, H, P\\)"):
        ssd_chunked(u[0], delta, A, B, C)
    with pytest.raises(ValueError, match="delta has shape"):
        ssd_chunked(u, delta[:, 1:], A, B, C)
    with pytest.raises(ValueError, match="C has shape"):
        ssd_chunked(u, delta, A, B, C[..., 1:])
    with pytest.raises(ValueError, match="initial_state has shape"):
        ssd_chunked(u, delta, A, B, C, D, state.transpose(2, 3))
    with pytest.raises(ValueError, match="cannot share"):
        ssd_chunked(u[:, :, :3], delta[..., :3], A[:3], B, C)
    with pytest.raises(ValueError, match="chunk is 0"):
        ssd_chunked(u, delta, A, B, C, chunk=0)
