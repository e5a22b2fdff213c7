"""Products of the runtime's matrices, and what they make of their inputs, for tests of several folders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels.matrix import Decoder, Matrix, rounded


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(
    found: Tensor, x: Tensor, weights: Tensor, scale: Tensor | None, bias: Tensor | None = None
) -> bool:
    """Within some roundings of float32 of the sum of magnitudes, which nothing but rounding can reach."""
    x = x.double()
    expected, room = x @ weights.T, x.abs() @ weights.abs().T
    if bias is not None:
        expected, room = expected + bias.double(), room + bias.double().abs()
    if scale is not None:  # bytes are multiplied as w + 128, and 128 taken off again
        room = room + 128 * x.abs().sum(1, keepdim=True) * scale.double()
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return bool(((found.double() - expected).abs() <= 4e-6 * room + 1e-30).all())


def probe(head: Matrix, x: Tensor) -> tuple[Tensor, Tensor]:
    """What decoding makes of x with a matrix, by a network of no layers; and the normed x that it saw."""
    rows, cols = head.rows, head.cols
    table = torch.zeros(rows, cols)
    count = min(len(x), rows)
    table[:count] = x[:count]
    sizes = {"width": cols, "channels": 1, "states": 1, "rank": 1, "taps": 1, "vocabulary": rows}
    rest = {"norm": torch.ones(cols), "embedding": Matrix.dense(table), "head": head}
    decoder = Decoder(sizes | {"epsilon": 1e-5}, [], rest)
    logits = decoder.step(torch.arange(count), torch.empty(count, 0), 1)
    return logits, F.rms_norm(x[:count], (cols,), None, 1e-5)


def bits_of(found: Tensor) -> Tensor:
    """That each code takes in two's complement; 0 takes none."""
    size = torch.where(found < 0, ~found.int(), found.int())
    return torch.where(found == 0, 0, 1 + (size[..., None] >> torch.arange(15) > 0).sum(-1))


def seen(x: Tensor, found: Tensor, columns: Tensor | None) -> Tensor:
    """Inputs as the codes meet them, in units of the weight's columns: rounded by 64 of those that lie
    together, the largest columns first."""
    factors = torch.ones(x.shape[1]) if columns is None else columns
    order = torch.sort(bits_of(found).sum(0), descending=True, stable=True).indices
    met = torch.empty_like(x)
    met[:, order] = rounded((x * factors)[:, order])
    return met / factors
