"""Mamba-2's scan forward: a program for each sequence, head and 32 of the head's channels, step by step.

The states (P, N) of a head stay in registers, so they can be written after any step, and every sum is a
float32 one. The products of the chunked form (`ssd_chunked`) would run on tensor cores, but in float32 those
round to 11 bits. One sequence of a model with 24 heads of 64 channels is 48 programs only: a GPU is full with
some twenty sequences.
"""

# Branches on what is None are taken when Triton compiles, where it may be missing, and its types are its own.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsessm.kernels.gpu.scan import begun, load
from sparsessm.kernels.gpu.tiles import blocks, on, packed, power_of_two, rows, steps, tile


@triton.jit
def _walk(
    u, delta, A, B, C, D, start, y, last, sampled,
    length, piece, heads, ratio, channels, states,
    u_w, u_t, u_h, delta_w, delta_t, B_w, B_t, B_g, C_w, C_t, C_g,
    tile_states: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Some channels of one head of one sequence; the states after every `piece` steps go to `sampled`."""
    w, h = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    p = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    n = tl.arange(0, tile_states)
    on_p, on_n = p < channels, n < states
    on_both = on_n[:, None] & on_p[None, :]
    entry = p[None, :] * states + n[:, None]  # of (P, N)
    own = (w * heads + h) * channels * states
    rate = tl.load(A + h).to(tl.float32)
    state = begun(start, own + entry, on_both)
    if D is not None:
        skip = tl.load(D + h).to(tl.float32)
    group = h // ratio
    u_at, delta_at = u + w * u_w + h * u_h + p, delta + w * delta_w + h
    B_at, C_at = B + w * B_w + group * B_g + n, C + w * C_w + group * C_g + n
    y_at = y + (w * length * heads + h) * channels + p
    if sampled is not None:
        sampled_at = sampled + w * (length // piece) * heads * channels * states + h * channels * states
    for first in range(0, length, piece):
        for _ in range(first, tl.minimum(first + piece, length)):
            x, step = load(u_at, on_p), tl.load(delta_at).to(tl.float32)
            state = tl.exp(step * rate) * state + load(B_at, on_n)[:, None] * (step * x)[None, :]
            out = tl.sum(state * load(C_at, on_n)[:, None], 0)
            if D is not None:
                out += skip * x
            tl.store(y_at, out, mask=on_p)
            u_at += u_t
            delta_at += delta_t
            B_at += B_t
            C_at += C_t
            y_at += heads * channels
        if sampled is not None:
            if first + piece <= length:
                tl.store(sampled_at + entry, state, mask=on_both)
                sampled_at += heads * channels * states
    tl.store(last + own + entry, state, mask=on_both)


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
    """y (W, T, H, P) in u's dtype, the last state and those of every so many steps in float32; as
    `reference.ssd_scan`."""
    (windows, length, heads, channels), (groups, states) = u.shape, B.shape[2:]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = y.new_empty(windows, heads, channels, states, dtype=torch.float32)
    sampled = last.new_empty(windows, length // every, *last.shape[1:]) if every else None
    u, delta, B, C = (rows(x) for x in (u, delta, B, C))
    size = tile(states)
    lanes = min(size.channels, power_of_two(channels))
    with on(u):
        _walk[(windows * heads, blocks(channels, lanes))](
            *(u, delta, packed(A), B, C, packed(D), packed(initial_state), y, last, sampled),
            *(length, every or max(1, length), heads, heads // groups, channels, states),
            *steps(u, delta, B, C),
            tile_states=size.states,
            tile_channels=lanes,
            num_warps=size.warps,
        )
    return (y, last) if sampled is None else (y, last, sampled)
