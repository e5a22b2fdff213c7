"""The kernels' door: the names of reference.py, native where the extension is built, for inputs on the CPU;
for those on another device what gpu/ chooses, Triton's or plain torch.

On the CPU float64 uses the reference. Otherwise bfloat16 and float16 inputs are computed in float32.
Shapes, dtypes, layouts and devices are checked here and refused by name. Channel tensors may be strided views
as long as their last dimension is contiguous; others are copied.

`selective_scan` and `causal_conv1d` take part in torch's autograd; where no gradient is asked for they leave
no trace in it. What is carried from one slab of time to the next (states, the inputs before) is outside of
it, and so is `selective_scan_stats`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm.kernels import gpu, level, reference
from sparsessm.kernels.arguments import MAX_STATES as MAX_STATES
from sparsessm.kernels.arguments import check_conv, check_scan, expect_floats, expect_shape
from sparsessm.kernels.reference import ScanStats

try:
    from sparsessm.kernels import _native as _loaded  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # built without a C++ compiler: everything still works, slowly
    _loaded = None
_native: Any = _loaded

NATIVE: bool = _native is not None
LEVELS: tuple[str, ...] = ("reference", *(_native.levels() if _native else ()))  # here, slowest first
LEVEL: str = level.asked(LEVELS)  # what runs

__all__ = [
    "LEVEL",
    "LEVELS",
    "NATIVE",
    "ScanStats",
    "causal_conv1d",
    "causal_conv1d_backward",
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_stats",
]


def empty(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the extension writes into, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def extension() -> Any:
    """The native extension, for matrix.py.

    Raises:
        RuntimeError: it is not built, or switched off.
    """
    if _native is None or LEVEL == "reference":
        raise RuntimeError("the native kernels are not installed")
    return _native


def built() -> Any:
    """The native extension at every level, for entropy.py: whole numbers have no precision to choose."""
    return _native


def native_crc32c(content: Any, before: int, portable: bool = False) -> int:
    """For checksum.py, at every level: a checksum has no precision to choose.

    Args:
        content: uint8 (count,), a contiguous array.
        portable: without the processor's instruction for it.
    """
    return _native.crc32c(content, before, portable)


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
    """The selective scan (arXiv 2312.00752, eq. 2): h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t.

    Args:
        u: (batch, L, D) input after convolution and SiLU.
        delta: (batch, L, D) step sizes, after softplus.
        A: (D, N), negative. B, C: (batch, L, N). D: (D,).
        z: (batch, L, D) gate; the output is multiplied by silu(z) if given.
        initial_state: (batch, D, N); zeros if not given.

    Returns:
        y (batch, L, D) = (C_t . h_t + D u_t) [* silu(z_t)] in u's dtype, and the last state (batch, D, N).
        y is differentiable in everything but the initial state; but for the reference the last state is not
        differentiable and its gradient is refused.

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit, named; an initial state that requires
            a gradient.
    """
    check_scan(u, delta, A, B, C, D, z, initial_state)
    wanted = _wants_gradient("initial_state", initial_state, u, delta, A, B, C, D, z)
    if _as_defined(u):
        return reference.selective_scan(u, delta, A, B, C, D, z, initial_state)
    run = _Scan.apply if wanted else _scan
    return run(u, delta, A, B, C, D, z, initial_state)


def _scan(u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if not u.is_cpu:
        return gpu.form(u).selective_scan(u, *others)
    inputs = _prepare(u, *others)
    y, last = empty(u.shape), empty(u.shape[0], *others[1].shape)
    _native.selective_scan(LEVEL, torch.get_num_threads(), *inputs, y, last)
    return y.to(u.dtype), last


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
    """`selective_scan` that also sums, in the same pass, what the scores for A_log need (docs/methods.md).

    Long sequences are fed in slabs of time, all sequences of the calibration set at once, so that the sums
    over the batch are complete at every step and (L, D, N) exists only for the slab: pass the returned states
    as the next slab's initial ones.

    Args:
        removed: what a removed entry of A_log computes: "memoryless" (a_t = 0) or "unit" (A = -1).
        energy: sum_b h_{t-1}^2 and sum_b a_t for each t.
        gram: "full" for the N x N Gram of output errors per channel, "diagonal" for its diagonal, or None.
        removed_state: (batch, D, N) state of the recurrence with A = -1 at the start ("unit" only).

    Returns:
        y, last state, and the sums (`ScanStats`): gram, cross, power in float64 and without the factor
        ||W_out[:, d]||^2.

    Raises:
        ValueError: a shape, dtype, layout, device or option that does not fit, named.
    """
    check_scan(u, delta, A, B, C, D, z, initial_state)
    if removed_state is not None:
        expect_floats(u=u, removed_state=removed_state)
        expect_shape("removed_state", removed_state, (u.shape[0], *A.shape))
    if removed not in ("memoryless", "unit"):
        raise ValueError(f"removed is {removed!r}; allowed: 'memoryless', 'unit'")
    if gram not in (None, "full", "diagonal"):
        raise ValueError(f"gram is {gram!r}; allowed: None, 'full', 'diagonal'")
    if form := _other_form(u):
        options: Any = {"removed": removed, "energy": energy, "gram": gram, "removed_state": removed_state}
        return form.selective_scan_stats(u, delta, A, B, C, D, z, initial_state, **options)
    inputs = _prepare(u, delta, A, B, C, D, z, initial_state)
    (channels, states), unit = A.shape, removed == "unit"
    y, last = empty(u.shape), empty(u.shape[0], *A.shape)
    by_time = [empty(u.shape[1], states, channels) if energy else None for _ in range(2)]
    other = torch.empty_like(last) if unit and gram else None
    full = empty(channels, states, states, dtype=torch.float64) if gram == "full" else None
    diagonal = empty(channels, states, dtype=torch.float64) if gram == "diagonal" else None
    cross = empty(channels, states, dtype=torch.float64) if gram else None
    power = empty(channels, dtype=torch.float64) if gram else None
    before = removed_state.float().contiguous() if removed_state is not None and unit and gram else None
    chosen = (*by_time, full, diagonal, cross, power)
    threads = torch.get_num_threads()
    _native.selective_scan_stats(LEVEL, threads, *inputs, y, last, unit, before, other, *chosen)
    energies, decays = (x if x is None else x.transpose(1, 2) for x in by_time)
    sums = ScanStats(energies, decays, full if gram == "full" else diagonal, cross, power, other)
    return y.to(u.dtype), last, sums


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
    """Gradients of `selective_scan`'s y; states are recomputed, only the inputs are kept from the forward.

    Args:
        dy: (batch, L, D) gradient of the loss with respect to y. The others as in `selective_scan`.

    Returns:
        Gradients of u, delta, A, B, C, D and z (None without z), each in its tensor's shape.
    """
    check_scan(u, delta, A, B, C, D, z, initial_state)
    expect_floats(u=u, dy=dy)
    expect_shape("dy", dy, u.shape)
    if form := _other_form(u):
        return form.selective_scan_backward(dy, u, delta, A, B, C, D, z, initial_state)
    inputs = _prepare(u, delta, A, B, C, D, z, initial_state)
    (batch, length, channels), states = u.shape, A.shape[1]
    # Partial sums over channels: their number depends on the shape alone, so no bit depends on the threads.
    groups = max(1, min(4, channels // 64))
    du, ddelta = empty(u.shape), empty(u.shape)
    dz = None if z is None else empty(u.shape)
    dA, dD = empty(batch, channels, states), empty(batch, channels)
    dB, dC = empty(groups, batch, length, states), empty(groups, batch, length, states)
    _native.selective_scan_backward(
        LEVEL, torch.get_num_threads(), _rows(dy), *inputs, du, ddelta, dA, dB, dC, dD, dz
    )
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    """Depthwise causal convolution, channel-last: y_t = bias + sum_k weight_k x_{t-K+1+k}; then SiLU.

    Args:
        x: (batch, L, D). weight: (D, K). bias: (D,). before: (batch, K-1, D), the inputs before x; zeros if
            not given.

    Returns:
        (batch, L, D) in x's dtype; differentiable in x, weight and bias.

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit, named; inputs before x that require a
            gradient.
    """
    check_conv(x, weight, bias, before)
    wanted = _wants_gradient("before", before, x, weight, bias)
    if _as_defined(x):
        return reference.causal_conv1d(x, weight, bias, before, silu=silu)
    run = _Conv.apply if wanted else _conv
    return run(x, weight, bias, before, silu)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool) -> Tensor:
    if not x.is_cpu:
        return gpu.form(x).causal_conv1d(x, weight, bias, before, silu=silu)
    y = empty(x.shape)
    packed = [None if t is None else t.detach().float().contiguous() for t in (weight, bias, before)]
    _native.causal_conv1d(LEVEL, torch.get_num_threads(), _rows(x), *packed, silu, y)
    return y.to(x.dtype)


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `causal_conv1d`; the sum before SiLU is computed again, only the inputs are kept.

    Args:
        dy: (batch, L, D) gradient of the loss with respect to y. The others as in `causal_conv1d`.

    Returns:
        Gradients of x, weight and bias (None without bias), each in its tensor's shape.

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit, named.
    """
    check_conv(x, weight, bias, before)
    expect_floats(x=x, dy=dy)
    expect_shape("dy", dy, x.shape)
    if form := _other_form(x):
        return form.causal_conv1d_backward(dy, x, weight, bias, before, silu=silu)
    (batch, length, channels), width = x.shape, weight.shape[1]
    dy, taps = dy.detach().float(), weight.detach().float()
    if silu:
        dy = torch.ops.aten.silu_backward(dy, _conv(x.detach().float(), weight, bias, before, False))
    dx = dy * taps[:, -1]
    for k in range(1, min(width, length)):  # x_t reaches y_{t+k} through tap K-1-k
        dx[:, : length - k].addcmul_(dy[:, k:], taps[:, width - 1 - k])
    past = dy.new_zeros(batch, width - 1, channels) if before is None else before.detach().float()
    seen = torch.cat([past, x.detach().float()], 1)
    dweight = torch.stack([(dy * seen[:, k : k + length]).sum((0, 1)) for k in range(width)], 1)
    return dx, dweight, None if bias is None else dy.sum((0, 1))


class _Scan(torch.autograd.Function):
    """`selective_scan` and its backward, natively or on another device."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return _scan(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        dy, dlast = grad_outputs
        if dlast is not None:
            raise ValueError("selective_scan: no gradient flows through the last state")
        if dy is None:
            return (None,) * 8
        return *selective_scan_backward(dy, *ctx.saved_tensors), None


class _Conv(torch.autograd.Function):
    """`causal_conv1d` and its backward, natively or on another device."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, before)
        ctx.silu = silu
        return _conv(x, weight, bias, before, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return *causal_conv1d_backward(*grad_outputs, *ctx.saved_tensors, silu=ctx.silu), None, None


def _wants_gradient(name: str, state: Tensor | None, *inputs: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    if state is not None and state.requires_grad:
        raise ValueError(f"{name} requires a gradient; none flows through it (detach it)")
    return any(x is not None and x.requires_grad for x in inputs)


def _as_defined(u: Tensor) -> bool:
    return u.is_cpu and (LEVEL == "reference" or u.dtype == torch.float64)


def _other_form(u: Tensor) -> Any:
    """The module that runs inputs like u if it is not the extension, else None."""
    if not u.is_cpu:
        return gpu.form(u)
    return reference if _as_defined(u) else None


def _rows(x: Tensor) -> Tensor:
    """Float32 with a contiguous last dimension; x and z, views into in_proj's output, are not copied."""
    x = x.detach().float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor | None,
) -> list[Tensor | None]:
    packed = [None if x is None else x.detach().float().contiguous() for x in (A, D, state)]
    gate = None if z is None else _rows(z)
    return [_rows(u), _rows(delta), packed[0], _rows(B), _rows(C), packed[1], gate, packed[2]]
