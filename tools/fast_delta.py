"""The model of `builtin:pydelta` and the forward that trains it: the text model of Qwen3.5, small, with gated
delta rule, attention and MLPs, on fast_mamba's pieces and the package's chunked delta rule.

Norms have weights around zero here (stock code adds one).
"""

from __future__ import annotations

import math
from typing import Any

import fast_mamba
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from sparsessm import kernels
from sparsessm.kernels.delta import gated_delta

LAYERS = 6
_PROJECTIONS = (f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down"))
MUON = tuple(f"{name}.weight" for name in ("in_proj_qkv", "in_proj_z", *_PROJECTIONS))


def new_model(entries: int, layers: int) -> PreTrainedModel:
    """A random model; what writes to the residual stream starts at zero. Two layers of delta rule for each
    layer of attention."""
    config = Qwen3_5TextConfig(
        vocab_size=entries, hidden_size=256, intermediate_size=448, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
        layer_types=["full_attention" if i % 3 == 2 else "linear_attention" for i in range(layers)],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
                         "mrope_interleaved": True, "mrope_section": [3, 3, 2]},
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3_5ForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
        elif name.endswith("_proj.weight") or ".in_proj_" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif name.endswith("dt_bias"):
            fast_mamba.start_steps(parameter)
        elif name.endswith("A_log"):
            parameter.data.uniform_(1, 16).log_()
    return model


def rows(name: str, config: Any) -> list[int] | None:
    """The parts of a matrix that Muon makes orthogonal one by one, as rows; None: the whole."""
    if "in_proj_qkv" not in name:
        return None
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return [keys, keys, config.linear_num_value_heads * config.linear_value_head_dim]


def compile_pieces() -> None:
    """Fuses the elementwise work (needs a C++ compiler; without this call it runs unfused)."""
    torch._dynamo.config.recompile_limit = 32  # norms have several widths here
    fast_mamba.compile_pieces()
    for piece in (_gated, _swished, _inputs):
        globals()[piece.__name__] = torch.compile(piece, dynamic=False)


def _gated(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    return y * F.silu(z)


def _swished(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _inputs(q: Tensor, k: Tensor, a: Tensor, b: Tensor, A_log: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k, -torch.exp(A_log) * F.softplus(a + bias), torch.sigmoid(b)


def _delta(mixer: Any, x: Tensor) -> Tensor:
    """Gated DeltaNet, (W, L, d) -> (W, L, d)."""
    mixed = fast_mamba.linear(x, mixer.in_proj_qkv.weight)
    z = fast_mamba.linear(x, mixer.in_proj_z.weight).unflatten(-1, (mixer.num_v_heads, -1))
    b, a = F.linear(x, mixer.in_proj_b.weight), F.linear(x, mixer.in_proj_a.weight)
    mixed = kernels.causal_conv1d(mixed, mixer.conv1d.weight[:, 0], None, silu=True)
    q, k, v = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
    q, k = (part.unflatten(-1, (mixer.num_k_heads, -1)) for part in (q, k))
    v = v.unflatten(-1, (mixer.num_v_heads, -1))
    q, k, g, beta = _inputs(q, k, a, b, mixer.A_log, mixer.dt_bias)
    y, _ = gated_delta(q, k, v, g, beta)
    y = _gated(y, z, mixer.norm.weight, mixer.norm.variance_epsilon)
    return fast_mamba.linear(y.flatten(2), mixer.out_proj.weight)


def _attention(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Attention with gate, norms of queries and keys and part of them rotated, (W, L, d) -> (W, L, d)."""
    heads, norm = (-1, attention.head_dim), fast_mamba.Norm.apply
    q, gate = fast_mamba.linear(x, attention.q_proj.weight).unflatten(-1, (-1, 2 * heads[1])).chunk(2, -1)
    k = fast_mamba.linear(x, attention.k_proj.weight).unflatten(-1, heads)
    v = fast_mamba.linear(x, attention.v_proj.weight).unflatten(-1, heads)
    q, k = (
        _turned(norm(part.contiguous(), 1 + module.weight, module.eps), *rotary)
        for part, module in ((q, attention.q_norm), (k, attention.k_norm))
    )
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = y.transpose(1, 2) * torch.sigmoid(gate)
    return fast_mamba.linear(y.flatten(2), attention.o_proj.weight)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first channels of x (W, L, heads, P) rotated by position; cos, sin (L, channels)."""
    turning, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turning.chunk(2, -1)
    turned = turning * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, rest], -1)


def final_hidden(model: Any, tokens: Tensor) -> Tensor:
    """Hidden states after the final norm: (W, L) int64 -> (W, L, d_model)."""
    backbone, norm = model.model, fast_mamba.Norm.apply
    hidden = F.embedding(tokens, backbone.embed_tokens.weight)
    place = torch.arange(tokens.shape[1])[None]
    cos, sin = (part[0].detach() for part in backbone.rotary_emb(hidden, place))
    for layer in backbone.layers:
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        x = norm(hidden, 1 + first.weight, first.eps)
        if layer.block_type == "linear_attention":
            hidden = hidden + _delta(layer.linear_attn, x)
        else:
            hidden = hidden + _attention(layer.self_attn, x, (cos, sin))
        x, mlp = norm(hidden, 1 + second.weight, second.eps), layer.mlp
        gate, up = fast_mamba.linear(x, mlp.gate_proj.weight), fast_mamba.linear(x, mlp.up_proj.weight)
        hidden = hidden + fast_mamba.linear(_swished(gate, up), mlp.down_proj.weight)
    return norm(hidden, 1 + backbone.norm.weight, backbone.norm.eps)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of tokens[:, 1:] given their past; tokens (W, L + 1)."""
    hidden = final_hidden(model, tokens[:, :-1].contiguous())
    embedding = model.get_input_embeddings().weight
    return fast_mamba.Loss.apply(hidden.flatten(0, 1), embedding, tokens[:, 1:].flatten())
