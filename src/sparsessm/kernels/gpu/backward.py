"""The selective scan's gradients: a program for each sequence and 32 channels, backwards in chunks of steps.

The forward pass kept nothing. One walk keeps the states before every `KEPT`th step; for each chunk, the last
one first, a program computes the states of its steps again, lays them into a scratch of its own, and goes
back over them. So there is memory for the states of L / `KEPT` + `KEPT` steps instead of L. Sums over
channels (B's and C's gradients) and over sequences (A's and D's) are left as partial sums by each program and
added by torch, in a fixed order.

Programs are as many as sequences times blocks of 32 channels, whatever L is: a few long sequences do not fill
a GPU.
"""

# Branches on what is None are taken when Triton compiles, where it may be missing, and its types are its own.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsessm.kernels.gpu.scan import KEPT, advanced, kept_states, load
from sparsessm.kernels.gpu.tiles import blocks, on, packed, rows, steps, tile


@triton.jit
def _back(
    dy, u, delta, A, B, C, D, z, kept, scratch, du, ddelta, dA, dB, dC, dD, dz,
    length, channels, states,
    dy_b, dy_t, u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t,
    every: tl.constexpr, tile_states: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """One sequence and one block of channels. du, ddelta, dz: (b, t, d); dA: (b, d, n); dD: (b, d); dB, dC:
    (block, b, t, n). With g_t the gradient of h_t, `later` is a_{t+1} g_{t+1}, what is known of g_t."""
    b, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = block * tile_channels + tl.arange(0, tile_channels)
    n = tl.arange(0, tile_states)
    on_d, on_n = d < channels, n < states
    on_both = on_n[:, None] & on_d[None, :]
    entry = d[None, :] * states + n[:, None]
    rate, skip = load(A + entry, on_both), load(D + d, on_d)
    size: tl.constexpr = tile_states * tile_channels
    own = scratch + (b * tl.num_programs(1) + block) * every * size
    own += n[:, None] * tile_channels + tl.arange(0, tile_channels)[None, :]
    chunks = tl.cdiv(length, every)
    first = b * 0 + (chunks - 1) * every  # in 64 bits
    u_at, delta_at = u + b * u_b + first * u_t + d, delta + b * delta_b + first * delta_t + d
    B_at, C_at = B + b * B_b + first * B_t + n, C + b * C_b + first * C_t + n
    dy_at = dy + b * dy_b + first * dy_t + d
    out_d = (b * length + first) * channels + d
    out_n = ((block * tl.num_programs(0) + b) * length + first) * states + n
    kept_at = kept + (b * chunks + chunks - 1) * channels * states + entry
    if z is not None:
        z_at = z + b * z_b + first * z_t + d
    later = tl.zeros((tile_states, tile_channels), tl.float32)
    sum_A = tl.zeros((tile_states, tile_channels), tl.float32)
    sum_D = tl.zeros((tile_channels,), tl.float32)
    count = length - (chunks - 1) * every  # the last chunk may be shorter
    for _ in range(chunks):
        h = load(kept_at, on_both)
        for i in range(count):
            tl.store(own + i * size, h)
            h = advanced(h, rate, load(delta_at, on_d), load(u_at, on_d), load(B_at, on_n))
            u_at += u_t
            delta_at += delta_t
            B_at += B_t
        tl.debug_barrier()  # the tile may be read by other threads than wrote it
        C_at += C_t * count
        dy_at += dy_t * count
        out_d += channels * count
        out_n += states * count
        if z is not None:
            z_at += z_t * count
        for i in range(count):
            u_at -= u_t
            delta_at -= delta_t
            B_at -= B_t
            C_at -= C_t
            dy_at -= dy_t
            out_d -= channels
            out_n -= states
            x, step, dout = load(u_at, on_d), load(delta_at, on_d), load(dy_at, on_d)
            b_t, c_t = load(B_at, on_n), load(C_at, on_n)
            before = tl.load(own + (count - 1 - i) * size)
            if z is not None:
                z_at -= z_t
                gate = load(z_at, on_d)
                sigmoid = tl.sigmoid(gate)
                y = tl.sum(h * c_t[:, None], 0) + skip * x
                slope = sigmoid * (1 + gate * (1 - sigmoid))
                tl.store(dz + out_d, dout * y * slope, mask=on_d)
                dout *= gate * sigmoid
            g = later + dout[None, :] * c_t[:, None]
            later = tl.exp(step[None, :] * rate) * g
            exponent = later * before  # the gradient of delta_t A
            into = tl.sum(g * b_t[:, None], 0)
            tl.store(du + out_d, dout * skip + step * into, mask=on_d)
            tl.store(ddelta + out_d, x * into + tl.sum(exponent * rate, 0), mask=on_d)
            tl.store(dB + out_n, tl.sum(g * (step * x)[None, :], 1), mask=on_n)
            tl.store(dC + out_n, tl.sum(h * dout[None, :], 1), mask=on_n)
            sum_A += exponent * step[None, :]
            sum_D += dout * x
            h = before
        tl.debug_barrier()
        count = every
        u_at -= u_t * count
        delta_at -= delta_t * count
        B_at -= B_t * count
        C_at -= C_t * count
        dy_at -= dy_t * count
        out_d -= channels * count
        out_n -= states * count
        kept_at -= channels * states
        if z is not None:
            z_at -= z_t * count
    tl.store(dA + b * channels * states + entry, sum_A, mask=on_both)
    tl.store(dD + b * channels + d, sum_D, mask=on_d)


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
    """Gradients of y in float32; as `reference.selective_scan_backward`."""
    (batch, length, channels), states = u.shape, A.shape[1]
    dy, u, delta, B, C = (rows(x) for x in (dy, u, delta, B, C))
    z, size = None if z is None else rows(z), tile(states, 8)
    groups = blocks(channels, size.channels)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    du, ddelta = empty(*u.shape), empty(*u.shape)
    dz = None if z is None else empty(*u.shape)
    dA, dD = empty(batch, channels, states), empty(batch, channels)
    dB, dC = empty(groups, batch, length, states), empty(groups, batch, length, states)
    kept = kept_states(u, delta, A, B, C, D, initial_state)
    scratch = empty(batch, groups, KEPT, size.states, size.channels)
    with on(u):
        _back[(batch, groups)](
            *(dy, u, delta, packed(A), B, C, packed(D), z, kept, scratch),
            *(du, ddelta, dA, dB, dC, dD, dz),
            *(length, channels, states, *steps(dy, u, delta, B, C, z)),
            every=KEPT,
            tile_states=size.states,
            tile_channels=size.channels,
            num_warps=size.warps,
        )
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz
