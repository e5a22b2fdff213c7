"""What every form of the kernels for other devices must do: the numbers of the reference in float64.

A form is a module with the functions of kernels/reference.py. Inputs are those of a model: u and z halves of
one tensor, B and C slices of another, delta transposed; the first entry of A is memoryless.
"""

from __future__ import annotations

from typing import Any

import torch
from scans import assert_close, inputs
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels import reference

MEMORYLESS = -3e16


def scan_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, gate: bool = True, started: bool = True
) -> list[Any]:
    """u, delta, A, B, C, D, z, initial_state; shape: batch, length, channels, states."""
    u, delta, A, B, C, D, z, state = (x.to(dtype) for x in inputs(*shape))
    A[0, 0] = MEMORYLESS
    u, z = torch.cat([u, z], -1).chunk(2, -1)
    B, C = torch.cat([B, C], -1).chunk(2, -1)
    delta = delta.mT.contiguous().mT
    return [u, delta, A, B, C, D, z if gate else None, state if started else None]


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x


def assert_same(got: Any, want: Any, tolerance: float) -> None:
    """Tensors one by one; None is None, and what has no numbers has the same shape."""
    for one, other in zip(got, want, strict=True):
        if isinstance(other, Tensor) and not other.numel():
            assert one.shape == other.shape
        else:
            assert_close(one, other, tolerance)


def assert_scan(form: Any, x: list[Any], tolerance: float) -> None:
    y, last = form.selective_scan(*x)
    assert y.dtype == x[0].dtype and last.dtype == torch.promote_types(x[0].dtype, torch.float32)
    assert_same((y, last), reference.selective_scan(*map(double, x)), tolerance)


def assert_stats(form: Any, x: list[Any], tolerance: float, **options: Any) -> None:
    before = None if x[7] is None else x[7] * 0.5
    *got, sums = form.selective_scan_stats(*x, removed_state=before, **options)
    *want, exact = reference.selective_scan_stats(*map(double, x), removed_state=double(before), **options)
    assert all(one is None or one.dtype == torch.float64 for one in sums[2:5])
    assert_same((*got, *sums), (*want, *exact), tolerance)


def assert_backward(form: Any, x: list[Any], tolerance: float) -> None:
    dy = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1), dtype=x[0].dtype)
    got = form.selective_scan_backward(dy, *x)
    assert all(one is None or one.isfinite().all() for one in got)
    assert_same(got, reference.selective_scan_backward(dy.double(), *map(double, x)), tolerance)


def conv_inputs(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, biased: bool, started: bool
) -> list[Any]:
    """x, a slice of a wider tensor, weight, bias, before; shape: batch, length, channels."""
    g = torch.Generator().manual_seed(0)
    batch, length, channels = shape
    sizes = ((batch, length, channels + 3), (channels, width), (channels,), (batch, width - 1, channels))
    x, weight, bias, before = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    return [x[..., 3:], weight, bias if biased else None, before if started else None]


def assert_conv(form: Any, x: list[Any], tolerance: float, silu: bool) -> None:
    """Forwards and backwards."""
    y = form.causal_conv1d(*x, silu=silu)
    assert y.dtype == x[0].dtype
    exact = [double(one) for one in x]
    assert_same([y], [reference.causal_conv1d(*exact, silu=silu)], tolerance)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    got = form.causal_conv1d_backward(dy, *x, silu=silu)
    assert_same(got, reference.causal_conv1d_backward(dy.double(), *exact, silu=silu), tolerance)


def ssd_inputs(shape: tuple[int, ...], dtype: torch.dtype, started: bool = True) -> list[Any]:
    """u, delta, A, B, C, D, initial_state; shape: windows, length, heads, channels, groups, states."""
    windows, length, heads, channels, groups, states = shape
    g = torch.Generator().manual_seed(0)
    sizes = [heads * channels, groups * states, groups * states]
    u, B, C = torch.randn(windows, length, sum(sizes), generator=g).to(dtype).split(sizes, -1)
    delta = F.softplus(torch.randn(windows, length, 2 * heads, generator=g) - 2).to(dtype)[..., heads:]
    A = -torch.exp(torch.randn(heads, generator=g)).to(dtype)
    A[-1] = MEMORYLESS
    D = torch.randn(heads, generator=g).to(dtype)
    state = torch.randn(windows, heads, channels, states, generator=g).to(dtype)
    B, C = (one.unflatten(2, (groups, states)) for one in (B, C))
    skip, start = (D, state) if started else (None, None)
    return [u.unflatten(2, (heads, channels)), delta, A, B, C, skip, start]


def assert_ssd(form: Any, x: list[Any], tolerance: float, every: int) -> None:
    got = form.ssd_scan(*x, every=every)
    assert got[0].dtype == x[0].dtype
    assert_same(got, reference.ssd_scan(*map(double, x), every=every), tolerance)


def everything(form: Any) -> list[Tensor]:
    """All results of all functions for one input each."""
    x = scan_inputs((3, 17, 2, 3), torch.float32)
    y, last, sums = form.selective_scan_stats(
        *x, removed="unit", energy=True, gram="full", removed_state=x[7]
    )
    conv = conv_inputs((2, 34, 3), 4, torch.float32, True, True)
    gradients = form.causal_conv1d_backward(conv[0], *conv, silu=True)
    found = [y, last, *sums, *form.selective_scan_backward(x[0], *x), *gradients]
    found += form.ssd_scan(*ssd_inputs((1, 9, 2, 3, 1, 4), torch.float32), every=2)
    return [*found, *form.selective_scan(*x), form.causal_conv1d(*conv, silu=True)]


def assert_slabs_are_one_pass(form: Any, length: int, split: int) -> None:
    """States, and the sums of a second recurrence, are carried from slab to slab."""
    options: Any = {"removed": "unit", "energy": True, "gram": "full"}
    *x, start = scan_inputs((2, length, 3, 4), torch.float32)
    y, last, whole = form.selective_scan_stats(*x, start, removed_state=start, **options)
    state, other, parts = start, start, []
    for span in (slice(0, split), slice(split, length)):
        cut = [one[:, span] if one.ndim == 3 else one for one in x]
        out, state, sums = form.selective_scan_stats(*cut, state, removed_state=other, **options)
        other = sums.removed_state
        parts.append((out, sums))
    joined = [torch.cat([out for out, _ in parts], 1), state, other]
    joined += [torch.cat([getattr(sums, name) for _, sums in parts]) for name in ("energy", "decay")]
    joined += [sum(getattr(sums, name) for _, sums in parts) for name in ("gram", "cross", "power")]
    wanted = [y, last, whole.removed_state, whole.energy, whole.decay, whole.gram, whole.cross, whole.power]
    assert_same(joined, [one.double() for one in wanted], 1e-5)


def assert_memoryless_is_exact(form: Any) -> None:
    """Nothing of the state before is left, whatever it was."""
    x = scan_inputs((2, 20, 3, 4), torch.float32)
    x[2][:, 1] = MEMORYLESS
    x[7] *= 1e6
    _, last = form.selective_scan(*x)
    fed = (x[1][:, -1] * x[0][:, -1]) * x[3][:, -1, 1:2]
    torch.testing.assert_close(last[:, :, 1], fed, rtol=1e-6, atol=0)


def assert_extremes_stay_finite_and_nan_shows(form: Any) -> None:
    x = scan_inputs((1, 10, 5, 3), torch.float32)
    x[1][0, 3], x[1][0, 4], x[6][0, 5], x[6][0, 6] = 0.0, 80.0, 200.0, -200.0
    assert_scan(form, x, 1e-5)
    assert_backward(form, [*x[:2], x[2].clamp(min=-1e3), *x[3:]], 1e-5)
    x[0][0, 7, 2] = torch.nan
    y, _ = form.selective_scan(*x)
    assert y[0, 7:, 2].isnan().all() and not y[0, :, 3].isnan().any() and not y[0, :7].isnan().any()
