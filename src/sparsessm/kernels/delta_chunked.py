"""The gated delta rule (Yang, Kautz & Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464) over chunks of
time, in plain differentiable torch: no step of Python for each token. The form for float64 and for every
device; the door is delta.py, the definition `reference.gated_delta`.

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

from sparsessm.kernels.chunked import decays

CHUNK, BY_CHANNEL = 64, 16  # steps whose system is solved at once; where decays differ by channel
GONE = -1000.0  # exp of it is zero, also in float64; sums over a chunk of larger ones would lose small steps


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta.gated_delta`, differentiable as often as one likes.

    Args:
        chunk: steps at once (64; 16 where decays differ by channel); T need not be a multiple.

    Raises:
        ValueError: a chunk without steps.
    """
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


@torch.no_grad()
def energies_chunked(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`delta.energies`, without making the states.

    With w_s the corrections of a chunk and b_ts the decay between two steps, row n of the state is
    p_tn S_n + sum_s b_tsn k_sn w_s, and its squared norm three sums over pairs of steps.
    """
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
