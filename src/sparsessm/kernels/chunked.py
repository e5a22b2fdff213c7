"""The state space dual form of Mamba-2 (Dao & Gu, arXiv 2405.21060, section 6): the recurrence as matrix
products over chunks of time, in plain differentiable torch. Letters: W sequences, L steps, H heads of P
channels, G groups of heads that share B and C, N states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels.arguments import expect_floats


def ssd_chunked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T and y_t = h_t C_t + D u_t, for each head.

    The large products take operands in u's dtype; decays, sums and states are float32 (float64 if u or delta
    is). So bfloat16 u, B and C with float32 delta and A cost about 0.4 % of error in y; on a CPU that
    multiplies bfloat16 the products then take a third to a half of the time.

    Args:
        u: (W, L, H, P) input after convolution and SiLU.
        delta: (W, L, H) step sizes, after softplus and clamp.
        A: (H,), negative; -3e16 makes a head memoryless.
        B, C: (W, L, G, N); head h belongs to group h // (H / G).
        D: (H,), nothing if not given.
        initial_state: (W, H, P, N); zeros if not given.
        chunk: steps whose products are made at once; L need not be a multiple.

    Returns:
        y (W, L, H, P) in u's dtype and the last state (W, H, P, N), differentiable in every input.

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit, named.
    """
    _check(u, delta, A, B, C, D, initial_state, chunk)
    (windows, length, heads, channels), (groups, states) = u.shape, B.shape[2:]
    low = u.dtype
    wide = torch.promote_types(torch.promote_types(low, delta.dtype), torch.float32)
    ratio = heads // groups
    if initial_state is None:
        state = u.new_zeros(windows, groups, states, ratio, channels, dtype=wide)
    else:
        state = (
            initial_state.to(wide).reshape(windows, groups, ratio, channels, states).permute(0, 1, 4, 2, 3)
        )
    if length == 0:
        return torch.zeros_like(u), _as_given(state)
    steps = min(chunk, length)
    # Filled up in front, where nothing has been read yet: the last row of a chunk is always a real step.
    missing = -length % steps
    full = [F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x for x in (u, delta[..., None], B, C)]
    count = (length + missing) // steps
    cut = (windows, count, steps)
    step = full[1].to(wide).reshape(*cut, heads)
    x = full[0].reshape(*cut, heads, channels)
    b, c = (t.to(low).reshape(*cut, groups, states).transpose(2, 3) for t in full[2:])  # (W, K, G, Q, N)
    fed = x * step[..., None]  # (W, K, Q, H, P)

    # Sums in float64: a float32 sum that a memoryless head has driven to -1e18 no longer sees a small step.
    summed = (step.double() * A.double()).cumsum(2).transpose(2, 3)  # (W, K, H, Q)
    decay = decays(summed, wide)  # (W, K, H, Q, Q)
    passed = torch.exp(summed).to(wide)  # from before the chunk to step t

    # Within a chunk: y_t = sum_s (C_t . B_s) decay_ts fed_s; C B^T is made once for the heads of a group.
    scores = (c @ b.transpose(-1, -2)).unsqueeze(3)  # (W, K, G, 1, Q, Q)
    mixing = (scores * decay.view(*decay.shape[:2], groups, ratio, steps, steps)).to(low)
    inside = mixing.flatten(2, 3) @ fed.to(low).transpose(2, 3)  # (W, K, H, Q, P)

    # Between chunks: what a chunk adds to the state, the states before each chunk, and what is read of them.
    left = decay[..., -1, :].transpose(2, 3)[..., None]  # (W, K, Q, H, 1): from step s to the chunk's end
    ending = (fed * left).to(low).view(*cut, groups, ratio * channels).transpose(2, 3)
    added = (b.transpose(-1, -2) @ ending).to(wide).view(windows, count, groups, states, ratio, channels)
    kept = passed[..., -1].reshape(windows, count, groups, 1, ratio, 1)
    before = []
    for k in range(count):
        before.append(state)
        state = kept[:, k] * state + added[:, k]
    history = torch.stack(before, 1).to(low).flatten(-2)  # (W, K, G, N, H / G * P)
    read = (c @ history).transpose(2, 3).reshape(*cut, heads, channels)

    y = inside.transpose(2, 3) + read * passed.transpose(2, 3)[..., None]
    if D is not None:
        y = y + x * D[:, None]
    return y.flatten(1, 2)[:, missing:].to(low), _as_given(state)


def decays(summed: Tensor, wide: torch.dtype) -> Tensor:
    """exp of what `summed` (..., Q) gains from step s to step t, in (..., t, s); zero for s > t.

    The mask comes before the exponential, which would overflow above the diagonal. The diagonal is a constant
    one: its difference is zero, and left in the sum its rounded gradient times a memoryless head's A would
    not be.
    """
    steps = summed.shape[-1]
    earlier = torch.ones(steps, steps, dtype=torch.bool, device=summed.device).tril(-1)
    fill = torch.full((steps, steps), -math.inf, dtype=wide, device=summed.device).triu(1)
    gained = (summed[..., :, None] - summed[..., None, :]).to(wide)
    return torch.exp(torch.where(earlier, gained, fill))


def _as_given(state: Tensor) -> Tensor:
    """(W, G, N, H / G, P) -> (W, H, P, N)."""
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    chunk: int,
) -> None:
    expect_floats(u=u, delta=delta, A=A, B=B, C=C, D=D, initial_state=initial_state)
    if u.ndim != 4 or B.ndim != 4 or 0 in (u.shape[0], *u.shape[2:], *B.shape[2:]):
        raise ValueError(
            f"u has shape {tuple(u.shape)} and B {tuple(B.shape)}, expected (W, L, H, P) and (W, L, G, N)"
        )
    (windows, length, heads, channels), (groups, states) = u.shape, B.shape[2:]
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups evenly")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    wanted = {
        "delta": (delta, (windows, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (windows, length, groups, states)),
        "C": (C, (windows, length, groups, states)),
        "D": (D, (heads,)),
        "initial_state": (initial_state, (windows, heads, channels, states)),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
