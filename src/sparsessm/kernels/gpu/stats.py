"""What the scores for A_log need of a selective scan (docs/methods.md): two more passes over the same inputs.

The first makes the sums over the sequences at each step (energy, decay). A program holds the states of up to
eight sequences, adds them up in its registers at every step, and writes one partial sum for the group.

The second makes the sums over sequences and steps (gram, cross). A program owns a few channels, some rows of
their N x N matrices and a run of sequences. It sums in float32 over at most `SUMMED` steps, and those sums in
float64. Programs do not add to one another's memory: what they leave is summed by torch in the order of the
sequences, so the same inputs give the same bits.
"""

# Branches on what is None are taken when Triton compiles, where it may be missing, and its types are its own.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels.gpu.scan import advanced, begun, load, selective_scan
from sparsessm.kernels.gpu.tiles import CHANNELS, blocks, on, packed, power_of_two, rows, steps, tile
from sparsessm.kernels.reference import ScanStats

TOGETHER, NUMBERS = 8, 2048  # sequences of a program of the first pass, and numbers of their states
ROUND, ROOM = 16, 2**27  # groups whose partial sums at each step are in memory at once, and their numbers
PAIRS = 2048  # numbers of a program's part of the Gram matrices
SUMMED = 64  # steps whose products are summed in float32
RUNS, PARTIAL = 16, 2**25  # runs of sequences at most, and float64 numbers of their partial sums


@triton.jit
def _by_time(
    u, delta, A, B, start, energy, decay,
    batch, length, channels, states,
    u_b, u_t, delta_b, delta_t, B_b, B_t,
    together: tl.constexpr, tile_states: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Sums over a group of sequences: h_{t-1}^2 and a_t, each (group, t, n, d)."""
    group = tl.program_id(0).to(tl.int64)
    b = group * together + tl.arange(0, together)
    n = tl.arange(0, tile_states)
    d = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    on_b, on_n, on_d = b < batch, n < states, d < channels
    on_entry = on_n[:, None] & on_d[None, :]
    entry = d[None, :] * states + n[:, None]
    rate = load(A + entry, on_entry)
    on_all = on_b[:, None, None] & on_entry[None, :, :]
    h = begun(start, b[:, None, None] * channels * states + entry[None, :, :], on_all)
    u_at = u + b[:, None] * u_b + d[None, :]
    delta_at = delta + b[:, None] * delta_b + d[None, :]
    B_at = B + b[:, None] * B_b + n[None, :]
    out = group * length * states * channels + n[:, None] * channels + d[None, :]
    for _ in range(length):
        x = load(u_at, on_b[:, None] & on_d[None, :])
        step = load(delta_at, on_b[:, None] & on_d[None, :])
        a = tl.exp(step[:, None, :] * rate[None, :, :])
        tl.store(energy + out, tl.sum(h * h, 0), mask=on_entry)
        tl.store(decay + out, tl.sum(tl.where(on_b[:, None, None], a, 0.0), 0), mask=on_entry)
        b_t = load(B_at, on_b[:, None] & on_n[None, :])
        h = a * h + (step * x)[:, None, :] * b_t[:, :, None]
        u_at += u_t
        delta_at += delta_t
        B_at += B_t
        out += states * channels


@triton.jit
def _step(h, other, rate, x, step, gate, B_at, C_at, n, states, unit: tl.constexpr):
    """The states after a token, those with the entry removed ("unit"), and e_n = gate C_n (h - h')_n."""
    b = load(B_at + n, n < states)
    if unit:
        h = advanced(h, rate, step, x, b)
        other = tl.exp(-step)[None, :] * other + (step * x)[None, :] * b[:, None]
        lost = h - other
    else:
        lost = tl.exp(step[None, :] * rate) * h
        h = lost + (step * x)[None, :] * b[:, None]
    return h, other, gate[None, :] * load(C_at + n, n < states)[:, None] * lost


@triton.jit
def _write(gram, cross, gram_sum, cross_sum, number, d, n, m, channels, states, tile_rows: tl.constexpr):
    """The sums of a program of a run: its rows n, or the diagonal, and cross once for all rows."""
    on_columns = (m < states)[:, None] & (d < channels)[None, :]
    at = (number * states + m[:, None]) * channels + d[None, :]
    if tl.program_id(2) == 0:
        tl.store(cross + at, cross_sum, mask=on_columns)
    if tile_rows:
        row = (number * states + n[:, None, None]) * states + m[None, :, None]
        on_all = (n < states)[:, None, None] & on_columns[None, :, :]
        tl.store(gram + row * channels + d[None, None, :], gram_sum, mask=on_all)
    else:
        tl.store(gram + at, gram_sum, mask=on_columns)


@triton.jit
def _products(
    u, delta, A, B, C, z, start, other_start, gram, cross, other_last,
    batch, run, length, channels, states,
    u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t,
    summed: tl.constexpr, unit: tl.constexpr, tile_rows: tl.constexpr, tile_states: tl.constexpr,
    tile_channels: tl.constexpr,
):  # fmt: skip
    """Sums over a run of sequences: e_n e_m, (run, n, m, d) of some rows n, and e_n silu(z) u, (run, n, d).

    Without rows (`tile_rows` 0) the diagonal alone, (run, n, d). The states of a program's rows are computed
    beside those of all columns, as a tile's rows cannot be picked out of it.
    """
    number = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    n, m = tl.program_id(2) * tile_rows, tl.arange(0, tile_states)
    on_d = d < channels
    on_columns = (m < states)[:, None] & on_d[None, :]
    columns = d[None, :] * states + m[:, None]
    rate = load(A + columns, on_columns)
    part = tl.zeros((tile_states, tile_channels), tl.float32)
    cross_part, cross_sum = part, part.to(tl.float64)
    if tile_rows:
        n += tl.arange(0, tile_rows)
        on_rows = (n < states)[:, None] & on_d[None, :]
        of_rows = d[None, :] * states + n[:, None]
        row_rate = load(A + of_rows, on_rows)
        part = tl.zeros((tile_rows, tile_states, tile_channels), tl.float32)
    gram_sum = part.to(tl.float64)
    pending = 0
    for b in range(number * run, tl.minimum(number * run + run, batch)):
        own = b * channels * states
        h, other = begun(start, own + columns, on_columns), begun(other_start, own + columns, on_columns)
        if tile_rows:
            row_h = begun(start, own + of_rows, on_rows)
            row_other = begun(other_start, own + of_rows, on_rows)
        u_at, delta_at = u + b * u_b + d, delta + b * delta_b + d
        B_at, C_at = B + b * B_b, C + b * C_b
        if z is not None:
            z_at = z + b * z_b + d
        for _ in range(length):
            x, step = load(u_at, on_d), load(delta_at, on_d)
            gate = tl.full((tile_channels,), 1.0, tl.float32)
            if z is not None:
                gate = load(z_at, on_d)
                gate *= tl.sigmoid(gate)
                z_at += z_t
            h, other, error = _step(h, other, rate, x, step, gate, B_at, C_at, m, states, unit)
            cross_part += error * (gate * x)[None, :]
            if tile_rows:
                row_h, row_other, row_error = _step(
                    row_h, row_other, row_rate, x, step, gate, B_at, C_at, n, states, unit
                )
                part += row_error[:, None, :] * error[None, :, :]
            else:
                part += error * error
            pending += 1
            if pending == summed:
                gram_sum += part.to(tl.float64)
                cross_sum += cross_part.to(tl.float64)
                part, cross_part, pending = tl.zeros_like(part), tl.zeros_like(cross_part), 0
            u_at += u_t
            delta_at += delta_t
            B_at += B_t
            C_at += C_t
        if other_last is not None:
            if tl.program_id(2) == 0:
                tl.store(other_last + own + columns, other, mask=on_columns)
    gram_sum += part.to(tl.float64)
    cross_sum += cross_part.to(tl.float64)
    _write(gram, cross, gram_sum, cross_sum, number, d, n, m, channels, states, tile_rows)


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
    u, delta, B, C = (rows(x) for x in (u, delta, B, C))
    z = None if z is None else rows(z)
    A, start, unit = A.detach().contiguous(), packed(initial_state), removed == "unit"
    energies, decays = sums_by_time(u, delta, A, B, start) if energy else (None, None)
    if not gram:
        return y, last, ScanStats(energies, decays, None, None, None, None)
    other = torch.empty_like(last) if unit else None
    before = packed(removed_state) if unit else None
    total, cross = products(u, delta, A, B, C, z, start, before, other, full=gram == "full")
    passed = u.float() if z is None else F.silu(z.float()) * u.float()
    power = passed.double().square().sum((0, 1))
    return y, last, ScanStats(energies, decays, total, cross, power, other)


def sums_by_time(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """sum_b h_{t-1}^2 and sum_b a_t: (L, D, N) each, views of (L, N, D)."""
    (batch, length, channels), states = u.shape, A.shape[1]
    size = tile(states)
    together = min(TOGETHER, power_of_two(batch), max(1, NUMBERS // (size.states * size.channels)))
    total = u.new_zeros(2, length, states, channels, dtype=torch.float32)
    most = together * max(1, min(ROUND, ROOM // max(1, total.numel())))
    for first in range(0, batch, most):
        own = slice(first, first + most)
        one, state = u[own], None if start is None else start[own]
        parts = u.new_empty(2, blocks(len(one), together), length, states, channels, dtype=torch.float32)
        with on(u):
            _by_time[(parts.shape[1], blocks(channels, size.channels))](
                *(one, delta[own], A, B[own], state, *parts),
                *(len(one), length, channels, states, *steps(u, delta, B)),
                together=together,
                tile_states=size.states,
                tile_channels=size.channels,
                num_warps=max(4, size.warps),
            )
        total += parts.sum(1)
    energy, decay = total.mT
    return energy, decay


def products(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    start: Tensor | None,
    removed_start: Tensor | None,
    removed_last: Tensor | None,
    *,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """The sums of e_n e_m, (D, N, N) or the diagonal (D, N), and of e_n silu(z) u, (D, N), in float64.

    Args:
        removed_last: (batch, D, N), written: the recurrence with A = -1 ("unit"); None is memoryless.
    """
    (batch, length, channels), states = u.shape, A.shape[1]
    held, lanes, warps = tile(states, 8)
    lines = min(held, max(2, 256 // held)) if full else 0
    if full:
        lanes, warps = min(CHANNELS, PAIRS // (lines * held)), 4
    per_run = channels * states * (states if full else 1)
    run = blocks(batch, max(1, min(batch, RUNS, PARTIAL // per_run)))
    shape: tuple[Any, ...] = (blocks(batch, run), *((states,) if full else ()), states, channels)
    grams = u.new_empty(shape, dtype=torch.float64)
    crosses = u.new_empty(shape[0], states, channels, dtype=torch.float64)
    with on(u):
        _products[(shape[0], blocks(channels, lanes), blocks(states, lines) if full else 1)](
            *(u, delta, A, B, C, z, start, removed_start, grams, crosses, removed_last),
            *(batch, run, length, channels, states, *steps(u, delta, B, C, z)),
            summed=SUMMED,
            unit=removed_last is not None,
            tile_rows=lines,
            tile_states=held,
            tile_channels=lanes,
            num_warps=warps,
        )
    return grams.sum(0).movedim(-1, 0).contiguous(), crosses.sum(0).T.contiguous()
