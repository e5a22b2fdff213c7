"""Independent float64 transcriptions of what rounds: to the nearest (RTN), GPTQ (arXiv 2210.17323), and
SparseGPT's joint form (arXiv 2301.00774).

Slow loops on purpose: they share no code with the package. As in the authors' symmetric quantiser, the scale
is 2 max|w| / (2^bits - 1) and codes run from -2^(bits - 1) to 2^(bits - 1) - 1. Scales are float16. As in the
paper (the authors' code takes the weights of the block's beginning), those of a group are of the weights as
they are when the sweep reaches it.
"""

from __future__ import annotations

import numpy as np
from transcription_linear import damped, factor

Array = np.ndarray


def scale_of(values: Array, bits: int) -> float:
    most = max(abs(float(value)) for value in values)
    return float(np.float16(2 * most / (2**bits - 1))) if most > 0 else 1.0


def code_of(value: float, scale: float, bits: int) -> int:
    return int(min(max(np.round(value / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1))


def rtn(W: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Codes (out, in) and scales (out, groups)."""
    out, columns = W.shape
    codes, scales = np.zeros(W.shape, dtype=int), np.zeros((out, -(-columns // group)))
    for i in range(out):
        for j in range(columns):
            g = j // group
            scales[i, g] = scale_of(W[i, g * group : (g + 1) * group], bits)
            codes[i, j] = code_of(W[i, j], scales[i, g], bits)
    return codes, scales


def gptq(
    W: Array, H: Array, bits: int, group: int, damp: float = 0.01, keep: Array | None = None
) -> tuple[Array, Array]:
    """Codes and scales; with a mask the joint form, what is masked being zero."""
    W = np.array(W, dtype=np.float64)
    full = damped(H, damp)[0]
    U = factor(H, damp)
    assert np.allclose(U.T @ U, np.linalg.inv(full))
    out, columns = W.shape
    keep = np.ones(W.shape, dtype=bool) if keep is None else keep
    codes, scales = np.zeros(W.shape, dtype=int), np.zeros((out, -(-columns // group)))
    for j in range(columns):
        g = j // group
        for i in range(out):
            if j % group == 0:
                part = slice(j, j + group)
                scales[i, g] = scale_of(W[i, part] * keep[i, part], bits)
            codes[i, j] = code_of(W[i, j], scales[i, g], bits) if keep[i, j] else 0
            error = (W[i, j] - codes[i, j] * scales[i, g]) / U[j, j]
            for k in range(j + 1, columns):
                W[i, k] -= error * U[j, k]
    return codes, scales
