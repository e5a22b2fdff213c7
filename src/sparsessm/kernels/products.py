"""The precision of products: of linear layers in a forward, and of the moments of their inputs.

"float32" is torch's own product of what it is given, bit for bit. "bfloat16" rounds both sides to bfloat16
(8 bits of mantissa, to nearest even), multiplies exactly and sums in float32; what goes in and comes out
stays float32, and so does everything between two products: residual stream, convolution, scan, norms.
Natively rounded.cpp does it with AMX or AVX512_BF16; elsewhere torch multiplies the rounded numbers, which is
slow.

Who runs a block says the precision for that time (`computing`); outside of it every product is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsessm import kernels

CHOICES = ("float32", "bfloat16", "auto")
FAST = "amx"  # the unit that makes bfloat16 faster; AVX512_BF16 gained nothing on the Intel it was timed on


@dataclass(frozen=True)
class Choice:
    """Which precision products have.

    Attributes:
        asked: one of `CHOICES`. used: "float32" or "bfloat16". why: what auto looked at, in words.
    """

    asked: str
    used: str
    why: str

    def record(self) -> dict[str, str]:
        """For a result: beside these, what multiplies here."""
        by = (unit() or "rounded, then torch") if self.used == "bfloat16" else "torch"
        return {"asked": self.asked, "used": self.used, "by": by, "why": self.why}


FLOAT32 = Choice("float32", "float32", "asked for")


@dataclass
class _Now:
    """What holds while a block runs. `packed`: its weights, as they are and laid out, by where they lie."""

    rounds: bool
    packed: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


_now: ContextVar[_Now | None] = ContextVar("products", default=None)


def units() -> tuple[str, ...]:
    """The instruction sets of this CPU for bfloat16 products, slowest first, as far as the kernels may use
    them (SPARSESSM_KERNELS)."""
    if not kernels.LEVEL.startswith("avx512"):
        return ()
    return tuple(kernels.extension().rounded_units())


def unit() -> str:
    """The fastest of them; empty if there is none."""
    return (*("",), *units())[-1]


def choose(asked: str) -> Choice:
    """Decide what "auto" is on this CPU: without a clock, so that it is always the same here.

    Raises:
        ValueError: another word than `CHOICES`.
    """
    if asked not in CHOICES:
        raise ValueError(f"compute is {asked!r}; allowed: {', '.join(CHOICES)}")
    if asked != "auto":
        return Choice(asked, asked, "asked for")
    if FAST in units():
        return Choice(asked, "bfloat16", "this CPU has AMX tiles for bfloat16")
    return Choice(asked, "float32", "this CPU has no AMX tiles for bfloat16")


@contextmanager
def computing(compute: str) -> Iterator[None]:
    """Products of this thread are made so meanwhile; weights must stay as they are, they are laid out once.

    Args:
        compute: "float32" or "bfloat16".
    """
    before = _now.set(_Now(compute == "bfloat16"))
    try:
        yield
    finally:
        _now.reset(before)


def rounds() -> bool:
    """Whether products are rounded now."""
    now = _now.get()
    return now is not None and now.rounds


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) weight (out, in)' + bias (out,) -> (..., out), in the precision of now.

    A float64 model is never rounded. Where products are rounded, so are those of x's gradient; the weight has
    none.

    Raises:
        ValueError: a rounded product of a weight that requires a gradient, or shapes that do not fit.
    """
    now = _now.get()
    if now is None or not now.rounds or torch.float64 in (x.dtype, weight.dtype):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _linear(now, x, weight, bias)
    if weight.requires_grad:
        raise ValueError("the weight of a bfloat16 product has no gradient; compute in float32")
    return _Linear.apply(now, x, weight, bias)


def _linear(now: _Now, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _native(x, weight):
        return F.linear(rounded(x), rounded(weight), bias)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x has {x.shape[-1]} columns, weight {weight.shape[1]}")
    key = (weight.data_ptr(), *weight.shape, *weight.stride())
    if key not in now.packed:
        now.packed[key] = weight, _packed(weight)  # held, so that no other tensor comes to lie there
    rows = _rows(x.reshape(-1, x.shape[-1]))
    y = kernels.empty(len(rows), len(weight))
    shift = None if bias is None else bias.detach().contiguous()
    kernels.extension().rounded_linear(unit(), torch.get_num_threads(), rows, now.packed[key][1], shift, y)
    return y.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """A rounded linear layer and the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, now: _Now, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.now, ctx.weight = now, weight
        return _linear(now, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return None, _linear(ctx.now, grad_outputs[0], ctx.weight.T, None), None, None


def rounded(x: Tensor) -> Tensor:
    """The float32 values that bfloat16 makes of it."""
    return x.bfloat16().float()


class Sum:
    """left' right over the tokens of any number of slabs, in float64.

    Attributes:
        total: so far, None before the first slab. Where both sides are one and products are rounded, only
            what is on and above the diagonal counts until it is taken.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._half = False

    def add(self, left: Tensor, right: Tensor) -> None:
        """left (..., in, tokens), right (..., in2, tokens): adds (..., in, in2), in the precision of now.

        Matrices of depthwise layers, which have dimensions in front, are always float32: they are tiny.
        """
        if not rounds() or left.ndim > 2 or torch.float64 in (left.dtype, right.dtype):
            self._plus(left @ right.mT)
        elif not _native(left, right):
            self._plus(rounded(left) @ rounded(right).mT)
        else:
            if self.total is None:
                self.total = left.new_zeros(len(left), len(right), dtype=torch.float64)
            first = _rows(left.mT)
            second = first if left is right else _rows(right.mT)
            add = kernels.extension().add_rounded_moments
            self._half |= add(unit(), torch.get_num_threads(), first, second, self.total)

    def take(self) -> Tensor | None:
        """The sum, handed over: nothing is kept here."""
        total, half = self.total, self._half
        self.total, self._half = None, False
        return total.triu_().add_(total.triu(1).mT) if half and total is not None else total

    def _plus(self, part: Tensor) -> None:
        self.total = part.double() if self.total is None else self.total.add_(part)


def _native(*parts: Tensor) -> bool:
    return bool(units()) and all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)


def _packed(weight: Tensor) -> Tensor:
    turned = weight.stride(0) == 1 and weight.stride(1) != 1  # as the backward pass needs it
    rows = _rows(weight.T if turned else weight)
    packed = torch.empty(kernels.extension().packed_size(*weight.shape), dtype=torch.uint16, device="cpu")
    kernels.extension().round_matrix(torch.get_num_threads(), rows, turned, packed)
    return packed


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension; views of rows are not copied."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
