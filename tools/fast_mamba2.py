"""The forward that trains `builtin:pycode2`: a stock Mamba-2's parameters, on fast_mamba's pieces.

The recurrence is the package's chunked dual form with bfloat16 operands; decays, norms and sums are float32.
"""

from __future__ import annotations

from typing import Any

import fast_mamba
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsessm import kernels
from sparsessm.kernels.chunked import ssd_chunked


def _inner(
    mixed: Tensor,
    step: Tensor,
    gate: Tensor,
    step_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm: Tensor,
    sizes: tuple[int, int, int, int],
    eps: float,
) -> Tensor:
    """From the convolution's output (W, L, heads * channels + 2 * groups * states) to out_proj's input."""
    heads, groups, states, chunk = sizes
    inner = gate.shape[-1]
    x, B, C = mixed.bfloat16().split([inner, groups * states, groups * states], dim=-1)
    B, C = B.unflatten(-1, (groups, states)), C.unflatten(-1, (groups, states))
    delta = F.softplus(step + step_bias)
    y, _ = ssd_chunked(x.unflatten(-1, (heads, -1)), delta, -torch.exp(A_log), B, C, D, chunk=chunk)
    gated = (y.flatten(2).float() * F.silu(gate)).unflatten(-1, (groups, -1))
    scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (gated * scale).flatten(2) * norm


def compile_pieces() -> None:
    """Fuses the elementwise work (needs a C++ compiler; without this call it runs unfused)."""
    fast_mamba.compile_pieces()
    globals()["_inner"] = torch.compile(_inner, dynamic=False)


def mix(mixer: nn.Module, normed: Tensor, config: Any) -> Tensor:
    """A Mamba-2 mixer up to out_proj's input: (W, L, d_model) -> (W, L, inner)."""
    states = config.n_groups * config.state_size
    inner = config.num_heads * config.head_dim
    gate, mixed, step = fast_mamba.linear(normed, mixer.in_proj.weight).split(
        [inner, inner + 2 * states, config.num_heads], dim=-1
    )
    mixed = kernels.causal_conv1d(mixed, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, silu=True)
    sizes = (config.num_heads, config.n_groups, config.state_size, config.chunk_size)
    return _inner(
        mixed, step, gate, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight, sizes,
        config.layer_norm_epsilon,
    )  # fmt: skip


def final_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states after the final norm: (W, L) int64 -> (W, L, d_model)."""
    return fast_mamba.final_hidden(model, tokens, mix)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of tokens[:, 1:] given their past; tokens (W, L + 1)."""
    return fast_mamba.loss(model, tokens, mix)
