"""llama.cpp's formats for a matrix: the values that a reader of the file gets, and the bits that it takes.

Q8_0, Q5_0 and Q4_0 by the quantisers of the package `gguf`. It has none for the K-quants Q2_K, Q3_K and Q6_K,
only readers, so these are written from the format and from what llama.cpp does without an importance matrix:
in each block of 16 the scale (of Q2_K: scale and minimum) with the least error, weighted by the squares of
the weights, of a search around the largest one; then scales rounded to their few bits, and codes once more.
tests/test_kquants.py packs these codes and asks gguf's readers for the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUPER, BLOCK = 256, 16  # weights that share a float16, and a scale of few bits
BITS = {"Q8_0": 8.5, "Q5_0": 5.5, "Q4_0": 4.5, "Q6_K": 6.5625, "Q3_K": 3.4375, "Q2_K": 2.625}
SYMMETRIC = {"Q6_K": (32, 128), "Q3_K": (4, 32)}  # codes and scales from -n to n - 1
SIMPLE = ("Q8_0", "Q5_0", "Q4_0")


@dataclass(frozen=True)
class Coded:
    """Of blocks (B, 16, 16) in super-blocks: codes, scales (B, 16) as integers, float16 scale of those (B,).

    value = d scale code, in Q2_K d scale code - least minimum: codes 0 to 3, scales and minima 0 to 15.
    """

    codes: Tensor
    scales: Tensor
    d: Tensor
    minima: Tensor | None = None
    least: Tensor | None = None

    def values(self) -> Tensor:
        """(B, 16, 16) float32."""
        found = (self.d.float()[:, None] * self.scales)[..., None] * self.codes
        if self.minima is None or self.least is None:
            return found
        return found - (self.least.float()[:, None] * self.minima)[..., None]


def stored(weight: Tensor, kind: str) -> tuple[Tensor, float]:
    """The values of a matrix in this format and bits a weight; float16 where its rows do not divide.

    Args:
        weight: (out, in) float32. kind: a name of `BITS`.
    """
    if weight.shape[1] % (32 if kind in SIMPLE else SUPER):
        return weight.half().float(), 16.0
    if kind in SIMPLE:
        import gguf

        form = getattr(gguf.GGMLQuantizationType, kind)
        whole = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), form), form)
        return torch.from_numpy(whole).view_as(weight), BITS[kind]
    blocks = weight.reshape(-1, SUPER // BLOCK, BLOCK)
    coded = two_bits(blocks) if kind == "Q2_K" else symmetric(blocks, *SYMMETRIC[kind])
    return coded.values().view_as(weight), BITS[kind]


def symmetric(blocks: Tensor, most: int, largest: int) -> Coded:
    """Q3_K and Q6_K: codes from -most to most - 1, scales from -largest to largest - 1."""
    weights = blocks.square()
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # the code of this one is -most
    best, scale = torch.full_like(peak[..., 0], -1.0), torch.zeros_like(peak[..., 0])
    for step in range(-9, 10):
        inverse = torch.where(peak != 0, -(most + 0.1 * step) / peak, 0.0)
        codes = (blocks * inverse).round().clamp(-most, most - 1)
        product, power = (weights * blocks * codes).sum(-1), (weights * codes * codes).sum(-1)
        gain = torch.where(power > 0, product.square() / power.clamp(min=1e-30), 0.0)
        better = gain > best
        scale = torch.where(better & (power > 0), product / power.clamp(min=1e-30), scale)
        best = torch.maximum(best, gain)
    widest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))[:, 0]
    d = (widest / -largest).half()
    inverse = torch.where(d != 0, 1 / d.float(), 0.0)[:, None]
    scales = (scale * inverse).round().clamp(-largest, largest - 1)
    step = (d.float()[:, None] * scales)[..., None]
    codes = torch.where(step != 0, blocks / torch.where(step != 0, step, 1.0), 0.0)
    return Coded(codes.round().clamp(-most, most - 1), scales, d)


def two_bits(blocks: Tensor) -> Coded:
    """Q2_K: codes from 0 to 3 above a minimum that is not positive."""
    weights = blocks.abs()
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0.0), blocks.amax(-1, keepdim=True)
    best = torch.full_like(low[..., 0], torch.inf)
    scale, minimum = torch.zeros_like(best), torch.zeros_like(best)
    for step in range(16):
        wide = (high - low).clamp(min=1e-30)
        codes = ((2.5 + 0.1 * step) / wide * (blocks - low)).round().clamp(0, 3)
        total, ones, squares = weights.sum(-1), (weights * codes).sum(-1), (weights * codes * codes).sum(-1)
        values, products = (weights * blocks).sum(-1), (weights * blocks * codes).sum(-1)
        span = total * squares - ones * ones
        safe = span.clamp(min=1e-30)
        fitted = (total * products - values * ones) / safe
        offset = ((squares * values - ones * products) / safe).clamp(max=0.0)
        fitted = torch.where(offset == 0, products / squares.clamp(min=1e-30), fitted)
        error = (weights * (fitted[..., None] * codes + offset[..., None] - blocks).abs()).sum(-1)
        better = (error < best) & (span > 0)
        scale, minimum = torch.where(better, fitted, scale), torch.where(better, -offset, minimum)
        best = torch.where(better, error, best)
    parts = []
    for found in (scale, minimum):
        d = (found.amax(-1).clamp(min=0.0) / 15).half()
        parts.append((d, (found / d.float()[:, None].clamp(min=1e-30)).round().clamp(0, 15)))
    (d, scales), (least, minima) = parts
    step, offset = (d.float()[:, None] * scales)[..., None], (least.float()[:, None] * minima)[..., None]
    codes = torch.where(step != 0, (blocks + offset) / torch.where(step != 0, step, 1.0), 0.0)
    return Coded(codes.round().clamp(0, 3), scales, d, minima, least)
