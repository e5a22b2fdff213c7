"""The causal convolution of each channel and its gradients: a program for each piece of 32 steps and 32
channels, so there are as many programs as the inputs have room for.

Taps overlap in memory that a program has just read, so nothing is kept between them. Backwards there are two
passes: the gradient of the sum before SiLU, then from it the inputs' gradients, and of weight and bias a
partial sum for each program. torch adds those in a fixed order.
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

from sparsessm.kernels.gpu.scan import load
from sparsessm.kernels.gpu.tiles import CHANNELS, blocks, on, packed, power_of_two, rows, steps

STEPS = 32  # of a program


@triton.jit
def _seen(x, before, at, on_d, d, b, length, channels, x_b, x_t, width: tl.constexpr):
    """x at the steps `at`, which go back to -(width - 1): what came before x, zeros if None."""
    seen = load(x + b * x_b + at[:, None] * x_t + d[None, :], ((at >= 0) & (at < length))[:, None] & on_d)
    if before is not None:
        past = b * (width - 1) + at[:, None] + (width - 1)
        seen += load(before + past * channels + d[None, :], (at < 0)[:, None] & on_d)
    return seen


@triton.jit
def _summed(x, weight, bias, before, t, on_d, d, b, length, channels, x_b, x_t, width: tl.constexpr):
    """The convolution before SiLU at the steps t: (t, d)."""
    own = d[None, :]
    y = tl.zeros((t.shape[0], d.shape[0]), tl.float32)
    for k in tl.static_range(width):  # pyright: ignore[reportGeneralTypeIssues]
        seen = _seen(x, before, t - (width - 1) + k, on_d, d, b, length, channels, x_b, x_t, width)
        y += seen * load(weight + own * width + k, on_d)
    if bias is not None:
        y += load(bias + own, on_d)
    return y


@triton.jit
def _place(length, channels, tile_steps: tl.constexpr, tile_channels: tl.constexpr):
    """The sequence, the steps and the channels of a program, and which of its channels there are."""
    pieces = tl.cdiv(length, tile_steps)
    b = tl.program_id(0).to(tl.int64) // pieces
    t = tl.program_id(0).to(tl.int64) % pieces * tile_steps + tl.arange(0, tile_steps)
    d = tl.program_id(1) * tile_channels + tl.arange(0, tile_channels)
    return b, t, d, (d < channels)[None, :]


@triton.jit
def _forward(
    x, weight, bias, before, y,
    length, channels,
    x_b, x_t,
    width: tl.constexpr, silu: tl.constexpr, tile_steps: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    b, t, d, on_d = _place(length, channels, tile_steps, tile_channels)
    out = _summed(x, weight, bias, before, t, on_d, d, b, length, channels, x_b, x_t, width)
    if silu:
        out *= tl.sigmoid(out)
    at = (b * length + t[:, None]) * channels + d[None, :]
    tl.store(y + at, out, mask=(t < length)[:, None] & on_d)


@triton.jit
def _before_silu(
    dy, x, weight, bias, before, out,
    length, channels,
    dy_b, dy_t, x_b, x_t,
    width: tl.constexpr, tile_steps: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """The gradient of what SiLU was given, (b, t, d)."""
    b, t, d, on_d = _place(length, channels, tile_steps, tile_channels)
    y = _summed(x, weight, bias, before, t, on_d, d, b, length, channels, x_b, x_t, width)
    sigmoid = tl.sigmoid(y)
    here = (t < length)[:, None] & on_d
    given = load(dy + b * dy_b + t[:, None] * dy_t + d[None, :], here)
    at = (b * length + t[:, None]) * channels + d[None, :]
    tl.store(out + at, given * sigmoid * (1 + y * (1 - sigmoid)), mask=here)


@triton.jit
def _backward(
    dy, x, weight, before, dx, dweight, dbias,
    length, channels,
    dy_b, dy_t, x_b, x_t,
    width: tl.constexpr, tile_steps: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """dx (b, t, d), and partial sums dweight (piece, k, d) and dbias (piece, d)."""
    b, t, d, on_d = _place(length, channels, tile_steps, tile_channels)
    piece = tl.program_id(0).to(tl.int64)
    here = (t < length)[:, None] & on_d
    given = load(dy + b * dy_b + t[:, None] * dy_t + d[None, :], here)
    out = tl.zeros((tile_steps, tile_channels), tl.float32)
    for k in tl.static_range(width):  # pyright: ignore[reportGeneralTypeIssues]
        # x_t reaches y_{t+K-1-k} through tap k
        late = t + (width - 1) - k
        there = (late < length)[:, None] & on_d
        reached = load(dy + b * dy_b + late[:, None] * dy_t + d[None, :], there)
        out += reached * load(weight + d[None, :] * width + k, on_d)
        seen = _seen(x, before, t - (width - 1) + k, on_d, d, b, length, channels, x_b, x_t, width)
        tap = tl.sum(given * seen, 0)
        tl.store(dweight + (piece * width + k) * channels + d, tap, mask=d < channels)
    tl.store(dx + (b * length + t[:, None]) * channels + d[None, :], out, mask=here)
    if dbias is not None:
        tl.store(dbias + piece * channels + d, tl.sum(given, 0), mask=d < channels)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    """(batch, L, D) in x's dtype; as `reference.causal_conv1d`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, width = rows(x), weight.shape[1]
    with on(x):
        if x.shape[1]:
            _forward[_grid(x)](
                *(x, packed(weight), packed(bias), packed(before), y, *x.shape[1:], *steps(x)),
                **_options(x, width, silu=silu),
            )
    return y


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias in float32; as `reference.causal_conv1d_backward`."""
    (_, length, channels), width = x.shape, weight.shape[1]
    dy, x, before = rows(dy), rows(x), packed(before)
    taps, shift, grid = packed(weight), packed(bias), _grid(x)
    dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    dweight = dx.new_empty(grid[0], width, channels)
    dbias = None if bias is None else dx.new_empty(grid[0], channels)
    if length:
        with on(x):
            if silu:
                inner = torch.empty_like(dx)
                inputs = (dy, x, taps, shift, before, inner, length, channels, *steps(dy, x))
                _before_silu[grid](*inputs, **_options(x, width))
                dy = inner
            outputs = (dx, dweight, dbias)
            inputs = (dy, x, taps, before, *outputs, length, channels, *steps(dy, x))
            _backward[grid](*inputs, **_options(x, width))
    return dx, dweight.sum(0).T.contiguous(), None if dbias is None else dbias.sum(0)


def _grid(x: Tensor) -> tuple[int, int]:
    batch, length, channels = x.shape
    return batch * blocks(length, STEPS), blocks(channels, CHANNELS)


def _options(x: Tensor, width: int, **others: Any) -> dict[str, Any]:
    """Short slabs have shorter tiles."""
    steps_ = min(STEPS, power_of_two(x.shape[1]))
    return {"width": width, "tile_steps": steps_, "tile_channels": CHANNELS, "num_warps": 4, **others}
