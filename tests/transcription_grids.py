"""Independent float64 transcriptions of what rounds: to the nearest (RTN), GPTQ (arXiv 2210.17323),
SparseGPT's joint form (arXiv 2301.00774), and the nested bitmaps of our files, written and read bit by bit.

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


EMPTY, EIGHTS = -2, -1  # forms that are no number of lowest bits


def written(codes: Array, form: int) -> list[list[int]]:
    """A row of codes as bitmaps: those of the lowest bits (or of the eights), not zero, sign, > 1, ..."""
    if form == EMPTY:
        return []
    low = max(form, 0)
    half = (1 << low) >> 1
    rest = [(int(z) + half) % (1 << low) for z in codes]
    high = [(int(z) + half) >> low for z in codes]
    planes = [[r >> bit & 1 for r in rest] for bit in range(low)]
    if form == EIGHTS:
        planes.append([int(any(high[at : at + 8])) for at in range(0, len(high), 8)])
        high = [h for at in range(0, len(high), 8) for h in high[at : at + 8] if any(high[at : at + 8])]
    planes.append([int(h != 0) for h in high])
    planes.append([int(h < 0) for h in high if h])
    alive, more = [abs(h) for h in high if h], 1
    while alive:
        planes.append([int(h > more) for h in alive])
        alive = [h for h in alive if h > more]
        more += 1
    return planes


def read(planes: list[list[int]], form: int, entries: int) -> list[int]:
    """The reverse of `written`."""
    if form == EMPTY:
        return [0] * entries
    planes = [list(plane) for plane in planes]
    low = max(form, 0)
    half = (1 << low) >> 1
    rest = [sum(planes[bit][j] << bit for bit in range(low)) for j in range(entries)]
    planes = planes[low:]
    eights = planes.pop(0) if form == EIGHTS else [1] * entries
    there, signs, deeper = planes[0], planes[1], planes[2:]
    high = []
    for j in range(entries):
        if not eights[j // 8] or not there.pop(0):
            high.append(0)
            continue
        sign, size, at = -1 if signs.pop(0) else 1, 1, 0
        while deeper[at].pop(0):
            size, at = size + 1, at + 1
        high.append(sign * size)
    return [(h << low) + r - half for h, r in zip(high, rest, strict=True)]
