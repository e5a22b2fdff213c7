"""What the kernels' doors take: real, dense tensors of one device. Everything else is refused by name here,
before a cast drops an imaginary part or native code reads what is no array."""

from __future__ import annotations

from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
