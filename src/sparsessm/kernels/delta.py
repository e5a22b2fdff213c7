"""The gated delta rule (Yang, Kautz & Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464) over chunks of
time, in plain differentiable torch: no step of Python for each token. The definition is
`reference.gated_delta`.

A step forgets, corrects what the state answers to a key, and reads:

    S_t = Diag(exp(g_t)) S_{t-1},   S_t += beta_t k_t (v_t - S_t' k_t)',   y_t = S_t' q_t

The corrections w_t = beta_t (v_t - S_t' k_t) of one chunk depend on each other through a unit lower
triangular system. It is solved once for the chunk ("UT transform", Yang et al., "Parallelizing Linear
Transformers with the Delta Rule over Sequence Length", arXiv 2406.06484, section 3); everything else is
products.

Letters: W sequences, T steps, H heads with values of P channels, G groups of heads that share q and k, K
channels of a key. Decays are one number for each head (Gated DeltaNet) or one for each channel of its key
(Kimi Delta Attention, arXiv 2510.26692).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels.arguments import expect_floats, expect_shape
from sparsessm.kernels.chunked import decays

CHUNK, BY_CHANNEL = 64, 16  # steps whose system is solved at once; where decays differ by channel
GONE = -1000.0  # exp of it is zero, also in float64; sums over a chunk of larger ones would lose small steps


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule for each head.

    Args:
        q, k: (W, T, G, K), as they enter the rule: normalised and scaled by the caller. Head h belongs to
            group h // (H / G).
        v: (W, T, H, P).
        g: (W, T, H) or (W, T, H, K), logarithms of the decays, at most 0; -3e16 forgets exactly.
        beta: (W, T, H), share of the correction that is written.
        initial_state: (W, H, K, P); zeros if not given.
        chunk: steps at once (64; 16 where decays differ by channel); T need not be a multiple.

    Returns:
        y (W, T, H, P) in v's dtype and the last state (W, H, K, P), float32 or float64; differentiable in
        every input.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    check_delta(q, k, v, g, beta, initial_state)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    wide = torch.promote_types(v.dtype, torch.float32)
    state = _started(initial_state, k, v)
    if not v.shape[1]:
        return torch.zeros_like(v), state
    steps = chunk or (BY_CHANNEL if g.ndim == 4 else CHUNK)
    parts = _cut((q, k, v, g, beta), v.shape[2], steps, wide)
    made = zip(*_by_head(*parts), strict=True) if g.ndim == 3 else map(_by_channel, *parts)
    outputs = []
    for chunk_ in made:
        y, state = _read(chunk_, state)
        outputs.append(y)
    y = torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)  # (W, T, H, P)
    return y[:, : v.shape[1]].to(v.dtype), state


def unit(x: Tensor) -> Tensor:
    """Queries and keys x (..., K) with length one, as stock code makes them: no division by zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def energies(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The squared norm of each head's state before every step, without making the states.

    With w_s the corrections of a chunk and b_ts the decay between two steps, row n of the state is
    p_tn S_n + sum_s b_tsn k_sn w_s, and its squared norm three sums over pairs of steps.

    Args, Raises: as `gated_delta`.

    Returns:
        (W, T, H) and the last state (W, H, K, P).
    """
    check_delta(k, k, v, g, beta, initial_state)
    state = _started(initial_state, k, v)
    g = g if g.ndim == 4 else g[..., None].expand(*g.shape, k.shape[-1])
    found = [state.square().sum((2, 3))[:, None]]
    for part in zip(*_cut((k, k, v, g, beta), v.shape[2], BY_CHANNEL, state.dtype), strict=True):
        _, keyed, _, decay, _ = part
        made = _by_channel(*part)
        corrections = made[1] - made[2] @ state
        summed = _summed(decay, -2).mT  # (W, H, K, steps)
        weights = decays(summed, state.dtype) * keyed.mT[..., None, :]  # (W, H, K, t, s)
        passed = torch.exp(summed).to(state.dtype)  # (W, H, K, t)
        before = passed.square() * state.square().sum(-1)[..., None]
        meeting = state @ corrections.mT  # (W, H, K, s)
        both = 2 * passed * (weights * meeting[..., None, :]).sum(-1)
        inside = torch.einsum("whkts,whsr,whktr->whkt", weights, corrections @ corrections.mT, weights)
        found.append((before + both + inside).sum(2).mT)
        _, state = _read(made, state)
    return torch.cat(found, 1)[:, : v.shape[1]], state


def _started(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """In the dtype that is computed in."""
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = v.shape[0], v.shape[2], k.shape[3], v.shape[3]
    return v.new_zeros(shape, dtype=wide) if state is None else state.to(wide)


def _cut(parts: tuple[Tensor, ...], heads: int, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Each (W, T, heads or groups, ...) as (chunks, W, H, steps, ...), the last of a beta with a dimension
    more.

    The last chunk is filled up behind: keys of zeros write nothing, decays of one forget nothing.
    """
    length = parts[0].shape[1]
    steps = min(steps, length)
    found = []
    for x in (*parts[:-1], parts[-1][..., None]):
        x = F.pad(x.to(dtype), (0, 0) * (x.ndim - 2) + (0, -length % steps)).unflatten(1, (-1, steps))
        x = x.transpose(0, 1).transpose(2, 3)
        found.append(x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2))
    return found


def _read(made: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs (W, H, steps, P) of a chunk after `state`, and the state behind it."""
    scores, values, keyed, queries, ending, kept = made
    corrections = values - keyed @ state
    return queries @ state + scores @ corrections, kept * state + ending.mT @ corrections


def _by_head(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """What a chunk needs of its inputs, whatever the state before it; for all chunks at once.

    Returns:
        Scores of q against k (..., steps, steps), the corrections if the state were zero (..., steps, P),
        what the state is multiplied by to get the rest of them (..., steps, K), queries and keys with their
        decays from and to the chunk's ends (..., steps, K), and the decay of the whole chunk.
    """
    summed = _summed(g, -1)
    between = decays(summed, v.dtype)  # (..., t, s)
    passed = torch.exp(summed).to(v.dtype)[..., None]
    values, keyed = _solved((k * beta) @ k.mT * between, v * beta, k * beta * passed)
    scores = q @ k.mT * between
    return scores, values, keyed, q * passed, k * between[..., -1, :, None], passed[..., -1:, :]


def _by_channel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """As `_by_head` for decays (..., steps, K): products of q and k are sums over channels that each
    decay."""
    summed = _summed(g, -2).mT  # (..., K, steps)
    between = decays(summed, v.dtype)  # (..., K, t, s)
    passed = torch.exp(summed).to(v.dtype).mT
    weighed = torch.einsum("whtk,whsk,whkts->whts", k, k, between)
    scores = torch.einsum("whtk,whsk,whkts->whts", q, k, between)
    values, keyed = _solved(weighed * beta, v * beta, k * beta * passed)
    return scores, values, keyed, q * passed, k * between[..., -1, :].mT, passed[..., -1:, :].mT


def _summed(g: Tensor, dim: int) -> Tensor:
    """Sums in float64, in which a memoryless step hides none of those behind it."""
    return g.double().clamp(min=GONE).cumsum(dim)


def _solved(system: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    """The solutions of (1 + what is below the diagonal of `system`) x = side."""
    both = torch.cat(sides, -1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    return solved.split([side.shape[-1] for side in sides], -1)


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
