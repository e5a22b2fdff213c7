"""Inputs of the gated delta rule, and the rule as plainly as it can be written."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FORGETS = -3e16  # the logarithm of a memoryless head's decay
Inputs = list[Tensor]


def inputs(W: int, T: int, G: int, many: int, K: int, P: int, *, channels: bool, seed: int = 0) -> Inputs:
    """q, k, v, g, beta and a state in float64; some steps forget all, some nothing, betas go up to 2."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    H = G * many
    q, k = (F.normalize(normal(W, T, G, K), dim=-1) for _ in range(2))
    g = -F.softplus(normal(W, T, H, *([K] if channels else [])) * 3)
    g = torch.where(normal(*g.shape) > 2, torch.full_like(g, FORGETS), g)
    g = torch.where(normal(*g.shape) > 2, torch.zeros_like(g), g)
    beta = 2 * torch.sigmoid(normal(W, T, H))
    return [q, k, normal(W, T, H, P), g, beta, normal(W, H, K, P)]


def plain(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and the squared norms of the states before each step: S (K, P) of one head at a time,
    multiplied by (1 - beta k k') Diag(exp(g)) as in the paper."""
    q, k, v, g, beta, start = x
    (W, T, H, _), (G, K) = v.shape, q.shape[2:]
    y, last, norms = torch.zeros_like(v), torch.zeros_like(start), torch.zeros(W, T, H, dtype=torch.float64)
    for w in range(W):
        for h in range(H):
            S, group = start[w, h].clone(), h // (H // G)
            for t in range(T):
                norms[w, t, h] = S.square().sum()
                key, b = k[w, t, group][:, None], beta[w, t, h]
                decay = torch.exp(g[w, t, h]).expand(K).diag()
                eye = torch.eye(K, dtype=torch.float64)
                S = (eye - b * key @ key.T) @ decay @ S + b * key @ v[w, t, h][None]
                y[w, t, h] = S.T @ q[w, t, group]
            last[w, h] = S
    return y, last, norms


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1.0)
