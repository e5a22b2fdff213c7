"""What the kernels' doors take: real, dense tensors of one device. Everything else is refused by name here,
before a cast drops an imaginary part or native code reads what is no array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_STATES = 256


def expect_floats(**tensors: Any) -> None:
    """Refuse tensors that no kernel computes with; None is an argument that was not given.

    Raises:
        TypeError: what is no tensor.
        ValueError: another dtype than float16, bfloat16, float32 or float64, a tensor that is not dense, or
            one that lies on another device than the first.
    """
    first = ""
    for name, x in tensors.items():
        if x is None:
            continue
        expect_dense(name, x)
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}; allowed: float16, bfloat16, float32, float64")
        first = first or name
        if x.device != tensors[first].device:
            raise ValueError(
                f"{name} is on the device {x.device} and {first} on {tensors[first].device}; "
                "all tensors must be on one device"
            )


def expect_dense(name: str, x: Any) -> None:
    """Refuse what is no tensor with strides.

    Raises:
        TypeError: what is no tensor.
        ValueError: a nested, sparse or otherwise laid out one.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; a tensor is needed")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").removesuffix("_coo")
        raise ValueError(f"{name} is a {kind} tensor; a dense one is needed")


def expect_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape, by its name."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> None:
    """Refuse arguments of `causal_conv1d` that do not fit together, by name."""
    expect_floats(x=x, weight=weight, bias=bias, before=before)
    if x.ndim != 3 or weight.ndim != 2 or 0 in (x.shape[0], x.shape[2], weight.shape[1]):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (batch, L, D) and (D, K)"
        )
    (batch, _, channels), width = x.shape, weight.shape[1]
    expect_shape("weight", weight, (channels, width))
    if bias is not None:
        expect_shape("bias", bias, (channels,))
    if before is not None:
        expect_shape("before", before, (batch, width - 1, channels))


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor | None,
) -> None:
    """Refuse arguments of `selective_scan` that do not fit together, by name."""
    expect_floats(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, initial_state=state)
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"u has shape {tuple(u.shape)} and A {tuple(A.shape)}, expected (batch, L, D) and (D, N)"
        )
    (batch, length, channels), states = u.shape, A.shape[1]
    if batch < 1 or channels < 1:
        raise ValueError(f"u has shape {tuple(u.shape)}; batch and D must be at least 1")
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"A has {states} states, allowed: 1 to {MAX_STATES}")
    expect_shape("delta", delta, u.shape)
    expect_shape("A", A, (channels, states))
    expect_shape("B", B, (batch, length, states))
    expect_shape("C", C, (batch, length, states))
    expect_shape("D", D, (channels,))
    if z is not None:
        expect_shape("z", z, u.shape)
    if state is not None:
        expect_shape("initial_state", state, (batch, channels, states))
