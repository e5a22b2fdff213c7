"""The door of Mamba-2's scan, in the manner of kernels/__init__.py: checks by name, native where it can be,
else the reference or what gpu/ chooses. Letters: W sequences, T steps, H heads of P channels, G groups of
heads that share B and C, N states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from sparsessm import kernels
from sparsessm.kernels.arguments import expect_floats, expect_shape
from sparsessm.kernels.chunked import ssd_chunked


@overload
def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    every: int,
) -> tuple[Tensor, ...]: ...


def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    every: int = 0,
) -> tuple[Tensor, ...]:
    """The scan of Mamba-2 (arXiv 2405.21060): h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T for each head.

    Where a gradient is asked for it is `ssd_chunked`. Views (slices of the convolution's output) are not
    copied as long as their last dimension is contiguous, and for u, B and C the last two together.

    Args:
        u: (W, T, H, P) input after convolution and SiLU.
        delta: (W, T, H) step sizes, after softplus and clamp.
        A: (H,), negative; -3e16 makes a head memoryless. D: (H,), nothing if not given.
        B, C: (W, T, G, N); head h belongs to group h // (H / G).
        initial_state: (W, H, P, N); zeros if not given.
        every: k > 0 also returns the states after steps k-1, 2k-1, ...: what their second moments are made
            of. Sampled, because summing them at every step would cost N times the scan. No other result
            depends on it.

    Returns:
        y (W, T, H, P) = h_t C_t + D u_t in u's dtype, the last state (W, H, P, N), and with `every` the
        states (W, T // every, H, P, N); states in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, layout, device or option that does not fit, named; an initial state that
            requires a gradient; `every` where a gradient is asked for.
    """
    _check(u, delta, A, B, C, D, initial_state, every)
    if kernels._wants_gradient("initial_state", initial_state, u, delta, A, B, C, D):
        if every:
            raise ValueError("every: no gradient flows through the states (use torch.no_grad)")
        return ssd_chunked(u, delta, A, B, C, D, initial_state)
    if form := kernels._other_form(u):
        return form.ssd_scan(u, delta, A, B, C, D, initial_state, every=every)
    (windows, length, heads, channels), (groups, states) = u.shape, B.shape[2:]
    flat = [kernels._rows(x.detach().flatten(2)) for x in (u, B, C)]
    rate = A.detach().float().contiguous()
    skip, state = (None if x is None else x.detach().float().contiguous() for x in (D, initial_state))
    y, last = (
        kernels.empty(windows, length, heads * channels),
        kernels.empty(windows, heads, channels, states),
    )
    sampled = kernels.empty(windows, length // every, heads, channels, states) if every else None
    options = (groups, skip, state, y, last, sampled, every)
    threads = torch.get_num_threads()
    kernels.extension().ssd_scan(
        kernels.LEVEL, threads, flat[0], kernels._rows(delta), rate, flat[1], flat[2], *options
    )
    y = y.view(u.shape).to(u.dtype)
    return (y, last) if sampled is None else (y, last, sampled)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    every: int,
) -> None:
    expect_floats(u=u, delta=delta, A=A, B=B, C=C, D=D, initial_state=state)
    if u.ndim != 4 or B.ndim != 4:
        raise ValueError(
            f"u has shape {tuple(u.shape)} and B {tuple(B.shape)}, expected (W, T, H, P) and (W, T, G, N)"
        )
    (windows, length, heads, channels), (groups, states) = u.shape, B.shape[2:]
    if 0 in (windows, heads, channels):
        raise ValueError(f"u has shape {tuple(u.shape)}; W, H and P must be at least 1")
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups of B")
    if states < 1:
        raise ValueError("B has no states")
    if every < 0:
        raise ValueError(f"every is {every}; allowed: 0 (no states) and up")
    shapes: list[tuple[str, Tensor | None, Sequence[int]]] = [
        ("delta", delta, (windows, length, heads)),
        ("A", A, (heads,)),
        ("B", B, (windows, length, groups, states)),
        ("C", C, (windows, length, groups, states)),
        ("D", D, (heads,)),
        ("initial_state", state, (windows, heads, channels, states)),
    ]
    for name, x, shape in shapes:
        if x is not None:
            expect_shape(name, x, shape)
