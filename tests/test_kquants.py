"""The K-quants that bench/frontier.py compares with are llama.cpp's: packed as its files have them, gguf's
own reader gives the same values."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def _kquants() -> ModuleType:
    """bench/kquants.py."""
    spec = importlib.util.spec_from_file_location(
        "kquants", Path(__file__).parents[1] / "bench" / "kquants.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


KQUANTS = _kquants()


def _bits(values: NDArray[Any], places: int, width: int, run: int) -> Bytes:
    """Fields of `width` bits, `places` to a byte: those of a byte lie `run` values apart."""
    parts = values.reshape(len(values), -1, places, run).astype(np.uint8)
    shifts = (width * np.arange(places, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2, dtype=np.uint8).reshape(len(values), -1)


def _joined(parts: list[NDArray[Any]]) -> Bytes:
    return np.hstack(parts).astype(np.uint8)


def q2(coded: Any) -> Bytes:
    codes, scales, minima = (np.asarray(part, np.uint8) for part in (coded.codes, coded.scales, coded.minima))
    halves = [np.asarray(part).view(np.uint8).reshape(-1, 2) for part in (coded.d, coded.least)]
    return _joined([scales | minima << 4, _bits(codes.reshape(len(codes), -1), 4, 2, 32), *halves])


def q3(coded: Any) -> Bytes:
    codes = (np.asarray(coded.codes, np.int64) + 4).astype(np.uint8).reshape(len(coded.codes), -1)
    scales = (np.asarray(coded.scales, np.int64) + 32).astype(np.uint8)
    low, high = scales & 15, scales >> 4
    packed = _joined([low[:, :8] | low[:, 8:] << 4, _bits(high, 4, 2, 4)])
    d = np.asarray(coded.d).view(np.uint8).reshape(-1, 2)
    return _joined([_bits(codes >> 2, 8, 1, 32), _bits(codes & 3, 4, 2, 32), packed, d])


def q6(coded: Any) -> Bytes:
    codes = (np.asarray(coded.codes, np.int64) + 32).astype(np.uint8).reshape(len(coded.codes), -1)
    scales = np.asarray(coded.scales, np.int8).view(np.uint8)
    d = np.asarray(coded.d).view(np.uint8).reshape(-1, 2)
    return _joined([_bits(codes & 15, 2, 4, 64), _bits(codes >> 4, 4, 2, 32), scales, d])


@pytest.mark.parametrize(("kind", "pack"), [("Q2_K", q2), ("Q3_K", q3), ("Q6_K", q6)])
def test_the_reader_of_gguf_reads_the_same(kind: str, pack: Callable[[Any], Bytes]) -> None:
    weight = (
        torch.randn(12, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 12)[:, None]
    )
    weight[3], weight[4, :16], weight[5, 256:] = 0, 0, weight[5, 256:].abs()
    blocks = weight.reshape(-1, 16, 16)
    coded = (
        KQUANTS.two_bits(blocks) if kind == "Q2_K" else KQUANTS.symmetric(blocks, *KQUANTS.SYMMETRIC[kind])
    )
    form = getattr(gguf.GGMLQuantizationType, kind)
    packed = pack(coded)
    assert packed.shape[1] * 8 == 256 * KQUANTS.BITS[kind]
    read = torch.from_numpy(gguf.quants.dequantize(packed, form)).view_as(weight)
    values, bits = KQUANTS.stored(weight, kind)
    assert bits == KQUANTS.BITS[kind] and torch.allclose(read, values, rtol=1e-6, atol=0)
    error = (values - weight).square().sum(1) / weight.square().sum(1).clamp(min=1e-30)
    assert (error < {"Q2_K": 0.15, "Q3_K": 0.04, "Q6_K": 1e-3}[kind]).all()


@pytest.mark.parametrize("kind", list(KQUANTS.BITS))
def test_rows_that_do_not_divide_stay_in_float16(kind: str) -> None:
    weight = torch.randn(4, 16)
    values, bits = KQUANTS.stored(weight, kind)
    assert bits == 16 and torch.equal(values, weight.half().float())
