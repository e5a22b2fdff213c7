"""The selective scan forward: a program for each sequence, piece of time and 32 channels.

A program walks over its tokens with its states in registers; what it reads and writes for a token is a few
rows. So its speed is that of a chain of multiplications, and a GPU is full when there are some thousand
programs: 100 windows of a model with 1,536 channels are 4,800. A few long sequences would leave it empty, so
they are cut into pieces of time, which costs a second pass: the first finds what each piece makes of a zero
state and how much it forgets, `composed` carries the states from piece to piece, and the second starts each
piece from the state before it (as Mamba-2 does with its chunks: arXiv 2405.21060, section 6).
"""

# Branches on what is None are taken when Triton compiles, where it may be missing, and its types are its own.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsessm.kernels.blocked import composed
from sparsessm.kernels.gpu.tiles import CHANNELS, blocks, on, packed, rows, steps, tile

PROGRAMS = 1024  # fewer, and long sequences are cut
SHORTEST = 64  # steps of a piece of time
KEPT = 16  # steps from one kept state to the next, for the backward pass


@triton.jit
def load(at, mask):
    """Numbers in float32, zeros where there are none."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def begun(start, at, mask):
    """The states that a recurrence starts from, zeros if none are given."""
    h = tl.zeros(mask.shape, tl.float32)
    if start is not None:
        h = load(start + at, mask)
    return h


@triton.jit
def advanced(h, rate, step, x, b):
    """The states (n, d) after a token: rate is A, step delta (d,), x the input (d,), b B (n,)."""
    return tl.exp(step[None, :] * rate) * h + (step * x)[None, :] * b[:, None]


@triton.jit
def _walk(
    u, delta, A, B, C, D, z, start, y, last, forgets, kept,
    length, span, pieces, channels, states,
    u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t,
    every: tl.constexpr, tile_states: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """One piece of one sequence. Outputs that are None are not computed; `start` None is zeros."""
    b = tl.program_id(0).to(tl.int64) // pieces
    piece = tl.program_id(0).to(tl.int64) % pieces
    first = piece * span
    count = tl.minimum(span, length - first)
    d = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    n = tl.arange(0, tile_states)
    on_d, on_n = d < channels, n < states
    on_both = on_n[:, None] & on_d[None, :]
    entry = d[None, :] * states + n[:, None]  # of (D, N)
    own = tl.program_id(0).to(tl.int64) * channels * states + entry
    rate = load(A + entry, on_both)
    h = begun(start, own, on_both)
    left = tl.full((tile_states, tile_channels), 1.0, tl.float32)
    u_at = u + b * u_b + first * u_t + d
    delta_at = delta + b * delta_b + first * delta_t + d
    B_at = B + b * B_b + first * B_t + n
    if y is not None:
        C_at = C + b * C_b + first * C_t + n
        y_at = y + (b * length + first) * channels + d
        skip = load(D + d, on_d)
        if z is not None:
            z_at = z + b * z_b + first * z_t + d
    if kept is not None:
        kept_at = kept + b * tl.cdiv(length, every) * channels * states + entry
    for now in range(0, count, every):
        if kept is not None:  # with one piece only
            tl.store(kept_at, h, mask=on_both)
            kept_at += channels * states
        for _ in range(now, tl.minimum(now + every, count)):
            x, step = load(u_at, on_d), load(delta_at, on_d)
            h = advanced(h, rate, step, x, load(B_at, on_n))
            if forgets is not None:
                left *= tl.exp(step[None, :] * rate)
            if y is not None:
                out = tl.sum(h * load(C_at, on_n)[:, None], 0) + skip * x
                if z is not None:
                    gate = load(z_at, on_d)
                    out *= gate * tl.sigmoid(gate)
                    z_at += z_t
                tl.store(y_at, out, mask=on_d)
                C_at += C_t
                y_at += channels
            u_at += u_t
            delta_at += delta_t
            B_at += B_t
    if last is not None:
        tl.store(last + own, h, mask=on_both)
    if forgets is not None:
        tl.store(forgets + own, left, mask=on_both)


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
    """y (batch, L, D) in u's dtype and the last state in float32; as `reference.selective_scan`."""
    (batch, length, channels), states = u.shape, A.shape[1]
    pieces, span = cut(batch, length, channels)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty(batch, pieces, channels, states, device=u.device, dtype=torch.float32)
    inputs = (u, delta, A, B, C, D, z)
    start = packed(initial_state)
    if pieces > 1:
        forgets = torch.empty_like(last)
        walk(*inputs, None, span=span, last=last, forgets=forgets)
        before = last.new_zeros(batch, channels, states) if start is None else start.float()
        after = composed(forgets, last, before)
        start = torch.cat([before[:, None], after[:, :-1]], 1)
    walk(*inputs, start, span=span, y=y, last=last)
    return y, last[:, -1].contiguous()


def cut(batch: int, length: int, channels: int) -> tuple[int, int]:
    """How many pieces of time, and their steps; the last one may have fewer."""
    programs = batch * blocks(channels, CHANNELS)
    wanted = max(1, min(PROGRAMS // programs, length // SHORTEST))
    span = max(1, blocks(length, wanted))
    return max(1, blocks(length, span)), span


def kept_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, start: Tensor | None
) -> Tensor:
    """The states before steps 0, `KEPT`, 2 `KEPT`, ...: (batch, L / `KEPT`, D, N), what the backward pass
    starts each chunk from."""
    count = blocks(u.shape[1], KEPT)
    kept = torch.empty(u.shape[0], count, *A.shape, device=u.device, dtype=torch.float32)
    walk(u, delta, A, B, C, D, None, packed(start), span=max(1, u.shape[1]), kept=kept)
    return kept


def walk(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    start: Tensor | None,
    *,
    span: int,
    y: Tensor | None = None,
    last: Tensor | None = None,
    forgets: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Launch the walk over pieces of `span` steps; what is given of the outputs is written.

    Args:
        start: (batch, D, N), or with several pieces (batch, pieces, D, N): the state before each.
        last, forgets: (batch, pieces, D, N), the last state of each piece and its product of decays.
        kept: (batch, L / `KEPT`, D, N), with one piece only.
    """
    (batch, length, channels), states = u.shape, A.shape[1]
    pieces, size = max(1, blocks(length, span)), tile(states)
    u, delta, B, C = (rows(x) for x in (u, delta, B, C))
    z = None if z is None else rows(z)
    with on(u):
        _walk[(batch * pieces, blocks(channels, size.channels))](
            *(u, delta, packed(A), B, C, packed(D), z, start, y, last, forgets, kept),
            *(length, span, pieces, channels, states, *steps(u, delta, B, C, z)),
            every=KEPT,
            tile_states=size.states,
            tile_channels=size.channels,
            num_warps=size.warps,
        )
