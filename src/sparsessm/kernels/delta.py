"""The door of the gated delta rule (Yang, Kautz & Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464), in
the manner of kernels/__init__.py: checks by name, native where it can be, else in chunks of plain torch. The
definition is `reference.gated_delta`.

A step forgets, corrects what the state answers to a key, and reads:

    S_t = Diag(exp(g_t)) S_{t-1},   S_t += beta_t k_t (v_t - S_t' k_t)',   y_t = S_t' q_t

Letters: W sequences, T steps, H heads with values of P channels, G groups of heads that share q and k, K
channels of a key. Decays are one number for each head (Gated DeltaNet) or one for each channel of its key
(Kimi Delta Attention, arXiv 2510.26692).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm import kernels
from sparsessm.kernels.arguments import expect_floats, expect_shape
from sparsessm.kernels.delta_chunked import delta_chunked, energies_chunked


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule for each head.

    Float64, and what does not lie on the CPU, goes through `delta_chunked`, which differs from the native
    steps by rounding.

    Args:
        q, k: (W, T, G, K), as they enter the rule: normalised and scaled by the caller. Head h belongs to
            group h // (H / G).
        v: (W, T, H, P).
        g: (W, T, H) or (W, T, H, K), logarithms of the decays, at most 0; -3e16 forgets exactly.
        beta: (W, T, H), share of the correction that is written.
        initial_state: (W, H, K, P); zeros if not given.

    Returns:
        y (W, T, H, P) in v's dtype and the last state (W, H, K, P), float32 or float64; both once
        differentiable in every input.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    check_delta(q, k, v, g, beta, initial_state)
    if not _native(v):
        return delta_chunked(q, k, v, g, beta, initial_state)
    inputs = (q, k, v, g, beta, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Rule.apply(*inputs)  # pyright: ignore[reportReturnType]
    return _rule(*inputs)


@torch.no_grad()
def energies(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The squared norm of each head's state before every step.

    Args, Raises: as `gated_delta`.

    Returns:
        (W, T, H) and the last state (W, H, K, P).
    """
    check_delta(k, k, v, g, beta, initial_state)
    if not _native(v):
        return energies_chunked(k, v, g, beta, initial_state)
    (windows, length, heads, _), last = v.shape, _state(k, v)
    squares = torch.zeros(windows, heads, length, dtype=torch.float32, device="cpu")
    others, groups, start = _prepare((k, v, g, beta), initial_state)
    kernels.extension().gated_delta(
        kernels.LEVEL, torch.get_num_threads(), None, *others, groups, start, None, last, squares
    )
    return squares.mT, last


def unit(x: Tensor) -> Tensor:
    """Queries and keys x (..., K) with length one, as stock code makes them: no division by zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _native(v: Tensor) -> bool:
    return v.is_cpu and v.dtype != torch.float64 and kernels.LEVEL != "reference"


def _state(k: Tensor, v: Tensor) -> Tensor:
    return kernels.empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3])


def _prepare(inputs: tuple[Tensor, ...], state: Tensor | None) -> tuple[list[Tensor], int, Tensor | None]:
    """(W, T, ...) flat behind the time, the number of groups of keys, and the state."""
    flat = [kernels._rows(x.detach().flatten(2)) for x in inputs]
    return flat, inputs[0].shape[2], None if state is None else state.detach().float().contiguous()


def _rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    flat, groups, start = _prepare((q, k, v, g, beta), state)
    y, last = kernels.empty(flat[2].shape), _state(k, v)
    kernels.extension().gated_delta(
        kernels.LEVEL, torch.get_num_threads(), *flat, groups, start, y, last, None
    )
    return y.view(v.shape).to(v.dtype), last


class _Rule(torch.autograd.Function):
    """`gated_delta` and its backward, natively. Of the states only some are kept for it, and only there."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return _rule(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        dy, dlast = grad_outputs
        *inputs, state = ctx.saved_tensors
        q, k, v, g, _ = inputs
        flat, groups, start = _prepare(tuple(inputs), state)
        (windows, length, heads, _), keys = v.shape, k.shape[3]
        dy = v.new_zeros(v.shape) if dy is None else dy
        by_head = [
            torch.zeros(windows, length, count, dtype=torch.float32, device="cpu")
            for count in (heads * keys, heads * keys, heads * v.shape[3], flat[3].shape[2], heads)
        ]
        dinitial = _state(k, v)
        kernels.extension().gated_delta_backward(
            kernels.LEVEL, torch.get_num_threads(), kernels._rows(dy.flatten(2)),
            None if dlast is None else dlast.float().contiguous(), *flat, groups, start, *by_head, dinitial,
        )  # fmt: skip
        shared = [x.view(windows, length, groups, heads // groups, keys).sum(3) for x in by_head[:2]]
        grads = [*shared, *(x.view(of.shape) for x, of in zip(by_head[2:], inputs[2:], strict=True))]
        found = [x.to(of.dtype) for x, of in zip(grads, inputs, strict=True)]
        return *found, None if state is None else dinitial.to(state.dtype)


def check_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None
) -> None:
    """
    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    expect_floats(v=v, q=q, k=k, g=g, beta=beta, initial_state=initial_state)
    if q.ndim != 4 or v.ndim != 4 or 0 in (v.shape[0], *v.shape[2:], *q.shape[2:]):
        raise ValueError(
            f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}, expected (W, T, G, K) and (W, T, H, P)"
        )
    (windows, length, heads, channels), (groups, keys) = v.shape, q.shape[2:]
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups of q and k")
    for name, x in (("q", q), ("k", k)):
        expect_shape(name, x, (windows, length, groups, keys))
    expect_shape("g", g, (windows, length, heads, keys) if g.ndim == 4 else (windows, length, heads))
    expect_shape("beta", beta, (windows, length, heads))
    if initial_state is not None:
        expect_shape("initial_state", initial_state, (windows, heads, keys, channels))
