"""The definition of every kernel, in plain PyTorch: slow, exact, any dtype and device. Tests compare the
native copies with it.

The selective scan is Gu & Dao, arXiv 2312.00752, eq. 2 with zero-order-hold A and Euler B, as in the authors'
`selective_scan_ref`; the statistics are those of docs/methods.md. Channel-last throughout; letters: b
sequence, t time, d channel, n state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ScanStats(NamedTuple):
    """Sums of one `selective_scan_stats` call; None where it was not asked for. h' is the state with the
    entry removed."""

    energy: Tensor | None  # (L, D, N): sum_b h_{t-1}^2, the energy of the state before the update
    decay: Tensor | None  # (L, D, N): sum_b a_t
    gram: (
        Tensor | None
    )  # (D, N, N) float64: sum_{b,t} e_n e_m with e_n = silu(z) C_n (h - h')_n; or (D, N), its diagonal
    cross: Tensor | None  # (D, N) float64: sum_{b,t} e_n silu(z) u
    power: Tensor | None  # (D,) float64: sum_{b,t} (silu(z) u)^2
    removed_state: Tensor | None  # (batch, D, N): last h' of the recurrence with A = -1 ("unit" only)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    state = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # (b, d, n)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1) + D * u[:, t])
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(u)
    return (y if z is None else y * F.silu(z)), state


def selective_scan_stats(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    removed: str = "memoryless",
    energy: bool = False,
    gram: str | None = None,
    removed_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, ScanStats]:
    y, last = selective_scan(u, delta, A, B, C, D, z, initial_state)
    state = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    other = torch.zeros_like(state) if removed_state is None else removed_state
    gate = torch.ones_like(u) if z is None else F.silu(z)
    energies, decays = u.new_zeros(u.shape[1], *A.shape), u.new_zeros(u.shape[1], *A.shape)
    pairs, cross = (
        A.new_zeros(*A.shape, A.shape[1], dtype=torch.float64),
        torch.zeros_like(A, dtype=torch.float64),
    )
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        entering = (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        energies[t], decays[t] = (state**2).sum(0), decay.sum(0)
        state = decay * state + entering
        other = entering if removed == "memoryless" else torch.exp(-delta[:, t, :, None]) * other + entering
        error = (gate[:, t, :, None] * C[:, t, None, :] * (state - other)).double()  # (b, d, n)
        pairs += torch.einsum("bdn,bdm->dnm", error, error)
        cross += torch.einsum("bdn,bd->dn", error, (gate[:, t] * u[:, t]).double())
    power = ((gate * u).double() ** 2).sum((0, 1))
    chosen = {None: None, "full": pairs, "diagonal": pairs.diagonal(dim1=1, dim2=2).clone()}[gram]
    by_time = (energies, decays) if energy else (None, None)
    sums = (chosen, cross, power) if gram else (None, None, None)
    return y, last, ScanStats(*by_time, *sums, other if gram and removed == "unit" else None)


def selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    u, delta, A, B, C, D = (x.detach().requires_grad_() for x in (u, delta, A, B, C, D))
    z = None if z is None else z.detach().requires_grad_()
    with torch.enable_grad():
        y, _ = selective_scan(u, delta, A, B, C, D, z, initial_state)
        du, ddelta, dA, dB, dC, dD, *rest = torch.autograd.grad(
            y, [u, delta, A, B, C, D, *([] if z is None else [z])], dy
        )
    return du, ddelta, dA, dB, dC, dD, rest[0] if rest else None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    width, length = weight.shape[1], x.shape[1]
    past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if before is None else before
    padded = torch.cat([past, x], 1)
    y = sum((padded[:, k : k + length] * weight[:, k] for k in range(width)), torch.zeros_like(x))
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    with torch.enable_grad():
        y = causal_conv1d(x, weight, bias, before, silu=silu)
        dx, dweight, *rest = torch.autograd.grad(y, [x, weight, *([] if bias is None else [bias])], dy)
    return dx, dweight, rest[0] if rest else None


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
    """Mamba-2's recurrence (Dao & Gu, arXiv 2405.21060), step by step; half precision in float32."""
    wide = torch.promote_types(u.dtype, torch.float32)
    x, step, decay, B, C = (t.to(wide) for t in (u, delta, torch.exp(delta.to(wide) * A.to(wide)), B, C))
    B, C = (t.repeat_interleave(u.shape[2] // t.shape[2], 2) for t in (B, C))  # (w, t, h, n)
    shape = (u.shape[0], *u.shape[2:], B.shape[3])
    state = x.new_zeros(shape) if initial_state is None else initial_state.to(wide)
    y, sampled = torch.zeros_like(x), []
    for t in range(u.shape[1]):
        entering = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = decay[:, t, :, None, None] * state + entering  # (w, h, p, n)
        y[:, t] = (state * C[:, t, :, None]).sum(-1)
        if every and (t + 1) % every == 0:
            sampled.append(state)
    y = (y if D is None else y + D.to(wide)[:, None] * x).to(u.dtype)
    if not every:
        return y, state
    return y, state, torch.stack(sampled, 1) if sampled else x.new_zeros(u.shape[0], 0, *shape[1:])


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (arXiv 2412.06464, eq. 10); arguments and results as in `delta.gated_delta`."""
    (windows, length, groups, keys), (heads, channels) = q.shape, v.shape[2:]
    state = v.new_zeros(windows, heads, keys, channels) if initial_state is None else initial_state
    q, k = (x.repeat_interleave(heads // groups, 2) for x in (q, k))
    decay = torch.exp(g if g.ndim == 4 else g[..., None])[..., None]  # (b, t, h, k or 1, 1)
    outputs = []
    for t in range(length):
        state = decay[:, t] * state
        answer = (state * k[:, t, :, :, None]).sum(2)  # (b, h, p)
        correction = beta[:, t, :, None] * (v[:, t] - answer)
        state = state + k[:, t, :, :, None] * correction[:, :, None]
        outputs.append((state * q[:, t, :, :, None]).sum(2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state
