"""The kernels in plain torch, for devices without ours and without Triton: no step of Python for each token.

A recurrence h_t = a_t h_{t-1} + b_t is a scan over pairs (a, b), and pairs compose: (a, b) and then (a', b')
is (a a', a' b + b'). Inside a block of time they are composed by doubling (Hillis & Steele 1986; for
recurrences Blelloch, "Prefix sums and their applications", 1990): after k rounds every step holds the
composition of the 2^k steps up to it. From block to block the state is carried. Decays are multiplied and
nothing is divided, so an entry whose decay is zero forgets exactly.

The functions are those of reference.py, on any device that has the dtypes (`ScanStats` sums in float64, and
Mamba-2's scan its exponents). Half precision is computed in float32. Letters: b sequence, t time, d channel,
n state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels import reference
from sparsessm.kernels.chunked import ssd_chunked
from sparsessm.kernels.reference import ScanStats

LONGEST, SHORTEST = 64, 8  # steps of a block
NUMBERS = 2**25  # of all states of a block, where it is not the shortest


def composed(decay: Tensor, fed: Tensor, start: Tensor) -> Tensor:
    """All h_t = decay_t h_{t-1} + fed_t of a block, by doubling.

    Args:
        decay, fed: (b, t, ...), t at least 1, in shapes that go with each other.
        start: (b, ...), h before the first step.
    """
    h = torch.cat([fed[:, :1] + decay[:, :1] * start[:, None], fed[:, 1:]], 1)
    reach = 1
    while reach < fed.shape[1]:
        h = torch.cat([h[:, :reach], h[:, reach:] + decay[:, reach:] * h[:, :-reach]], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return h


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
    """y (batch, L, D) in u's dtype and the last state; as `reference.selective_scan`."""
    low = u.dtype
    u, delta, A, B, C, D, z, state = _wide(u, delta, A, B, C, D, z, initial_state)
    state = _started(state, u, A)
    outputs = [torch.zeros_like(u[:, :0])]
    for span in _spans(u, A):
        h = composed(*_pairs(u[:, span], delta[:, span], A, B[:, span]), state)
        outputs.append(_read(h, C[:, span]))
        state = h[:, -1]
    y = torch.cat(outputs, 1) + D * u
    return (y if z is None else y * F.silu(z)).to(low), state.clone()


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
    """y, the last state and the sums; as `reference.selective_scan_stats`."""
    y, last = selective_scan(u, delta, A, B, C, D, z, initial_state)
    u, delta, A, B, C, z, state, other = _wide(u, delta, A, B, C, z, initial_state, removed_state)
    state, other = _started(state, u, A), _started(other, u, A)
    passed = u if z is None else F.silu(z) * u
    by_time = u.new_zeros(2, u.shape[1], *A.shape) if energy else None
    total = A.new_zeros(*A.shape, *((A.shape[1],) if gram == "full" else ()), dtype=torch.float64)
    cross = torch.zeros_like(A, dtype=torch.float64)
    for span in _spans(u, A):
        decay, entering = _pairs(u[:, span], delta[:, span], A, B[:, span])
        h = composed(decay, entering, state)
        before = torch.cat([state[:, None], h[:, :-1]], 1)
        state = h[:, -1]
        if by_time is not None:
            by_time[0, span], by_time[1, span] = before.square().sum(0), decay.sum(0)
        if not gram:
            continue
        if removed == "memoryless":
            lost = decay * before
        else:
            forgets = torch.exp(-delta[:, span, :, None])
            others = composed(forgets, entering, other)
            lost, other = h - others, others[:, -1]
        gate = 1 if z is None else F.silu(z[:, span, :, None])
        error = (gate * C[:, span, None] * lost).double()
        total += torch.einsum("btdn,btdm->dnm" if gram == "full" else "btdn,btdn->dn", error, error)
        cross += torch.einsum("btdn,btd->dn", error, passed[:, span].double())
    power = passed.double().square().sum((0, 1))
    sums = (total, cross, power) if gram else (None, None, None)
    energies, decays = (None, None) if by_time is None else by_time
    return y, last, ScanStats(energies, decays, *sums, other.clone() if gram and removed == "unit" else None)


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
    """Gradients of y in the dtype that was computed in; the states of one block at a time are in memory.

    With g_t the gradient of h_t, which is silu(z_t) dy_t C_t and what h_{t+1} makes of it, a_t g_t is that of
    h_{t-1}: a recurrence of the same kind, backwards in time.
    """
    dy, u, delta, A, B, C, D, z, state = _wide(dy, u, delta, A, B, C, D, z, initial_state)
    state, spans, starts = _started(state, u, A), _spans(u, A), []
    for span in spans:
        starts.append(state)
        state = composed(*_pairs(u[:, span], delta[:, span], A, B[:, span]), state)[:, -1]
    ungated = dy if z is None else dy * F.silu(z)
    du, ddelta, dB, dC = ungated * D, *(torch.zeros_like(x) for x in (u, B, C))
    dz = None if z is None else torch.zeros_like(u)
    dA, later = torch.zeros_like(A), torch.zeros_like(state)
    for span, start in zip(reversed(spans), reversed(starts), strict=True):
        x, step, b, c = u[:, span], delta[:, span], B[:, span], C[:, span]
        decay, entering = _pairs(x, step, A, b)
        h = composed(decay, entering, start)
        read = ungated[:, span, :, None] * c[:, :, None]
        through = composed(decay.flip(1), (decay * read).flip(1), later).flip(1)  # a_t g_t
        g = read + torch.cat([through[:, 1:], later[:, None]], 1)
        later = through[:, 0]
        exponent = through * torch.cat([start[:, None], h[:, :-1]], 1)  # the gradient of delta_t A
        into = (g * b[:, :, None]).sum(-1)
        du[:, span] += step * into
        ddelta[:, span] = x * into + (exponent * A).sum(-1)
        dA += (exponent * step[..., None]).sum((0, 1))
        dB[:, span] = (g * (step * x)[..., None]).sum(2)
        dC[:, span] = (h * ungated[:, span, :, None]).sum(2)
        if z is not None and dz is not None:
            sigmoid = torch.sigmoid(z[:, span])
            slope = sigmoid * (1 + z[:, span] * (1 - sigmoid))  # of silu
            dz[:, span] = dy[:, span] * (_read(h, c) + D * x) * slope
    return du, ddelta, dA, dB, dC, (ungated * u).sum((0, 1)), dz


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    """The reference, which has no loop over time; in x's dtype."""
    return reference.causal_conv1d(*_wide(x, weight, bias, before), silu=silu).to(x.dtype)


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference's, in the dtype that was computed in."""
    dy, x, weight, bias, before = _wide(dy, x, weight, bias, before)
    return reference.causal_conv1d_backward(dy, x, weight, bias, before, silu=silu)


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
    """`ssd_chunked`, and with `every` the sampled states; as `reference.ssd_scan`."""
    low = u.dtype
    u, delta, A, B, C, D, state = _wide(u, delta, A, B, C, D, initial_state)
    y, last = ssd_chunked(u, delta, A, B, C, D, state)
    if not every:
        return y.to(low), last
    start = torch.zeros_like(last) if state is None else state
    return y.to(low), last, _sampled(u, delta, A, B, start, every)


def _sampled(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor, every: int) -> Tensor:
    """The states after steps every - 1, 2 every - 1, ...: (W, K, H, P, N).

    A piece of `every` steps multiplies the state by one number for each head and adds one product to it.
    """
    (windows, length, heads, _), groups = u.shape, B.shape[2]
    count = length // every
    if not count:
        return state.new_zeros(windows, 0, *state.shape[1:])

    def cut(x: Tensor) -> Tensor:
        return x[:, : count * every].unflatten(1, (count, every))

    exponent = cut(delta * A)  # (W, K, E, H)
    summed = exponent.flip(2).cumsum(2).flip(2)  # from a step to the end of its piece
    after = torch.cat([summed[:, :, 1:], torch.zeros_like(summed[:, :, :1])], 2)
    fed = cut(u) * (torch.exp(after) * cut(delta))[..., None]
    fed = fed.unflatten(3, (groups, heads // groups))
    added = torch.einsum("wkegrp,wkegn->wkgrpn", fed, cut(B)).flatten(2, 3)
    kept = torch.exp(summed[:, :, 0])[..., None, None]
    found = []
    pieces = max(SHORTEST, min(LONGEST, NUMBERS // state.numel()))
    for k in range(0, count, pieces):
        found.append(composed(kept[:, k : k + pieces], added[:, k : k + pieces], state))
        state = found[-1][:, -1]
    return torch.cat(found, 1)


def _pairs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """What each step multiplies the state by and what it adds: (b, t, d, n)."""
    return torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]


def _read(h: Tensor, C: Tensor) -> Tensor:
    """C_t . h_t for each channel: (b, t, d)."""
    return (h * C[:, :, None]).sum(-1)


def _spans(u: Tensor, A: Tensor) -> list[slice]:
    """The blocks of time: as long as their states may take room."""
    step = u.shape[0] * A.numel()
    steps = max(SHORTEST, min(LONGEST, NUMBERS // step))
    return [slice(t, t + steps) for t in range(0, u.shape[1], steps)]


def _started(state: Tensor | None, u: Tensor, A: Tensor) -> Tensor:
    return u.new_zeros(u.shape[0], *A.shape) if state is None else state


def _wide(first: Tensor, *others: Tensor | None) -> list[Any]:
    """All in the dtype of the first, float32 at least, without their history."""
    wide = torch.promote_types(first.dtype, torch.float32)
    return [None if x is None else x.detach().to(wide) for x in (first, *others)]
