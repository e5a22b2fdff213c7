"""Inputs of scans and convolutions, and when two results are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels

pytestmark = pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")

SHAPES = [(1, 1, 1, 1), (2, 37, 21, 5), (3, 16, 16, 16), (1, 33, 130, 17), (2, 5, 7, 256), (1, 100, 64, 8)]
NATIVE_LEVELS = kernels.LEVELS[1:]


def inputs(batch: int, length: int, channels: int, states: int, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, z, initial_state in float32."""
    g = torch.Generator().manual_seed(seed)
    delta = F.softplus(torch.randn(batch, length, channels, generator=g) - 2)
    return [
        torch.randn(batch, length, channels, generator=g),
        delta,
        -torch.exp(torch.randn(channels, states, generator=g)),
        torch.randn(batch, length, states, generator=g),
        torch.randn(batch, length, states, generator=g),
        torch.randn(channels, generator=g),
        torch.randn(batch, length, channels, generator=g),
        torch.randn(batch, channels, states, generator=g),
    ]


def assert_close(got: Tensor | None, want: Tensor | None, tolerance: float = 1e-5) -> None:
    if want is None:
        assert got is None
        return
    assert got is not None and got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-30)
