"""The forward and backward that trains `builtin:pycode`: a stock Mamba's parameters, computed channel-last.

Convolution and scan are the package's kernels with their backwards. Matrix products run in bfloat16 (twice
float32 on a CPU with avx512_bf16), everything else in float32. The pieces with a hand-written backward exist
because autograd would keep and touch several times more memory; elementwise work is fused by torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsessm import kernels

CHUNK = 1024  # rows of logits alive at a time
Mix = Callable[[nn.Module, Tensor, Any], Tensor]  # a block's mixer, its normed input and the configuration


class _Linear(torch.autograd.Function):
    """x (T, in) @ weight (out, in)ᵀ with bfloat16 operands and float32 results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).float()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy = dy.bfloat16()
        return (dy @ weight).float(), (dy.t() @ x).float()


def _norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * weight, scale


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    unit = x * scale
    dunit = dy * weight
    dx = scale * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    return dx, (dy * unit).flatten(0, -2).sum(0)


def _loss_chunk(logits: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient over the logits (T, V)."""
    logits = logits.float()
    logsum = torch.logsumexp(logits, -1, keepdim=True)
    right = torch.arange(logits.shape[1])[None, :] == targets[:, None]
    dlogits = ((torch.exp(logits - logsum) - right.float()) / count).bfloat16()
    loss = logsum.sum() - torch.where(right, logits, 0.0).sum()
    return loss, dlogits


def compile_pieces() -> None:
    """Fuses the elementwise pieces (needs a C++ compiler; without this call they run unfused)."""
    for piece in (_norm_forward, _norm_backward, _loss_chunk):
        globals()[piece.__name__] = torch.compile(piece, dynamic=False)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_norm_backward(dy, *ctx.saved_tensors), None


class Loss(torch.autograd.Function):
    """Mean cross-entropy of hidden (T, d) under tied embeddings (V, d); gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        hidden, embedding = hidden.bfloat16(), embedding.bfloat16()
        count = hidden.shape[0]
        dhidden = torch.empty(hidden.shape)
        dembedding = torch.zeros(embedding.shape)
        loss = torch.zeros(())
        for i in range(0, count, CHUNK):
            part = hidden[i : i + CHUNK]
            summed, dlogits = _loss_chunk(part @ embedding.t(), targets[i : i + CHUNK], count)
            loss += summed
            dhidden[i : i + CHUNK] = dlogits @ embedding
            dembedding += dlogits.t() @ part
        ctx.save_for_backward(dhidden, dembedding)
        return loss / count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None]:
        dhidden, dembedding = ctx.saved_tensors
        return dhidden * dloss, dembedding * dloss, None


def start_steps(bias: nn.Parameter) -> None:
    """Biases behind which softplus gives steps between 0.001 and 0.1, as the authors of Mamba start them."""
    step = torch.exp(torch.rand_like(bias) * math.log(100) + math.log(0.001))
    bias.data.copy_(step + torch.log(-torch.expm1(-step)))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) @ weight (out, in)ᵀ -> (..., out)."""
    shape = x.shape
    return _Linear.apply(x.reshape(-1, shape[-1]), weight).view(*shape[:-1], -1)


def _mix(mixer: nn.Module, normed: Tensor, config: Any) -> Tensor:
    """A Mamba mixer up to out_proj's input: (W, L, d_model) -> (W, L, inner)."""
    rank, states = config.time_step_rank, config.state_size
    into_x, into_z = mixer.in_proj.weight.chunk(2)
    x = linear(normed, into_x)  # (W, L, D)
    z = linear(normed, into_z)  # (W, L, D)
    u = kernels.causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, silu=True)
    step, B, C = linear(u, mixer.x_proj.weight).split([rank, states, states], dim=-1)
    delta = F.softplus(linear(step, mixer.dt_proj.weight) + mixer.dt_proj.bias)
    y, _ = kernels.selective_scan(u, delta, -torch.exp(mixer.A_log), B, C, mixer.D, z)
    return y


def final_hidden(model: nn.Module, tokens: Tensor, mix: Mix = _mix) -> Tensor:
    """Hidden states after the final norm: (W, L) int64 -> (W, L, d_model)."""
    config, backbone = model.config, model.backbone
    eps = config.layer_norm_epsilon
    hidden = F.embedding(tokens, backbone.embeddings.weight)  # (W, L, d)
    for block in backbone.layers:
        y = mix(block.mixer, Norm.apply(hidden, block.norm.weight, eps), config)
        hidden = hidden + linear(y, block.mixer.out_proj.weight)
    return Norm.apply(hidden, backbone.norm_f.weight, eps)


def loss(model: nn.Module, tokens: Tensor, mix: Mix = _mix) -> Tensor:
    """Mean negative log-likelihood in nats of tokens[:, 1:] given their past; tokens (W, L + 1)."""
    hidden = final_hidden(model, tokens[:, :-1].contiguous(), mix)
    return Loss.apply(hidden.flatten(0, 1), model.backbone.embeddings.weight, tokens[:, 1:].flatten())
