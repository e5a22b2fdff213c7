"""The model of `builtin:pyhybrid` and the forward that trains it: a small Granite 4 (GraniteMoeHybrid):
Mamba-2 and attention without positions, each followed by a shared MLP beside experts; on the pieces of
fast_mamba2.

Its multipliers are one, and attention's is the usual root, so that nothing but the layers is particular.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fast_mamba
import fast_mamba2
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedModel

LAYERS = 6
BALANCE = 0.05  # weight of the term that keeps experts equally busy (Switch Transformer, eq. 4)
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "shared_mlp.input_linear", "shared_mlp.output_linear")
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # (experts, out, in)
MUON = (*(f"{name}.weight" for name in _LINEAR), *_EXPERTS)


def new_model(entries: int, layers: int) -> PreTrainedModel:
    """A random model; what writes to the residual stream starts at zero. Two layers of Mamba-2 for each layer
    of attention."""
    config = GraniteMoeHybridConfig(
        vocab_size=entries, hidden_size=256, shared_intermediate_size=96, intermediate_size=32,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, attention_multiplier=64**-0.5,
        layer_types=["full_attention" if i % 3 == 2 else "linear_attention" for i in range(layers)],
        mamba_n_heads=8, mamba_d_state=64, mamba_chunk_size=64, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=4096, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GraniteMoeHybridForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "output_linear.weight", "down_proj")):
            parameter.data.zero_()
        elif name.endswith(("_proj.weight", "input_linear.weight", "router.weight", "gate_up_proj")):
            bound = parameter.shape[-1] ** -0.5
            parameter.data.uniform_(-bound, bound)
        elif name.endswith("dt_bias"):
            fast_mamba.start_steps(parameter)
        elif name.endswith("A_log"):
            parameter.data.uniform_(1, 16).log_()
    return model


def rows(name: str, config: Any) -> list[int] | None:
    """The parts of a matrix that Muon makes orthogonal one by one, as rows; None: the whole."""
    if "in_proj" in name:
        inner = config.mamba_n_heads * config.mamba_d_head
        return [inner, inner, *[config.mamba_n_groups * config.mamba_d_state] * 2, config.mamba_n_heads]
    if "input_linear" in name:
        return [config.shared_intermediate_size] * 2
    if "gate_up_proj" in name:
        return [config.intermediate_size] * (2 * config.num_local_experts)
    if "experts.down_proj" in name:
        return [config.hidden_size] * config.num_local_experts
    return None


def compile_pieces() -> None:
    """Fuses the elementwise work (needs a C++ compiler; without this call it runs unfused)."""
    fast_mamba2.compile_pieces()
    globals()["_swished"] = torch.compile(_swished, dynamic=False)


def _swished(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def _mamba(mixer: Any, x: Tensor, config: Any) -> Tensor:
    """Mamba-2, (W, L, d) -> (W, L, d)."""
    sizes = SimpleNamespace(
        num_heads=config.mamba_n_heads, head_dim=config.mamba_d_head, n_groups=config.mamba_n_groups,
        state_size=config.mamba_d_state, chunk_size=config.mamba_chunk_size,
        layer_norm_epsilon=config.rms_norm_eps,
    )  # fmt: skip
    return fast_mamba.linear(fast_mamba2.mix(mixer, x, sizes), mixer.out_proj.weight)


def _attention(attention: Any, x: Tensor) -> Tensor:
    """Attention without positions, (W, L, d) -> (W, L, d)."""
    q, k, v = (
        fast_mamba.linear(x, part.weight).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=True)
    return fast_mamba.linear(y.transpose(1, 2).flatten(2), attention.o_proj.weight)


def _experts(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' sum, (T, d) -> (T, d), and how unequally they are busy (1: equally)."""
    logits = F.linear(x, block.router.weight)
    values, chosen = logits.topk(block.router.top_k)
    weights = values.softmax(-1)
    out, count = torch.zeros_like(x), logits.shape[-1]
    shares = F.one_hot(chosen, count).sum((0, 1)) / chosen.numel()
    for expert in range(count):
        token, place = torch.where(chosen == expert)
        if not len(token):
            continue
        gate, up = fast_mamba.linear(x[token], block.experts.gate_up_proj[expert]).chunk(2, -1)
        inside = F.silu(gate) * up * weights[token, place, None]
        out = out.index_add(0, token, fast_mamba.linear(inside, block.experts.down_proj[expert]))
    return out, count * (shares * logits.softmax(-1).mean(0)).sum()


def _hidden(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm, (W, L) int64 -> (W, L, d_model), and the layers' mean imbalance."""
    backbone, config = model.model, model.config
    eps, imbalance = config.rms_norm_eps, torch.zeros(())
    hidden = F.embedding(tokens, backbone.embed_tokens.weight)
    for layer in backbone.layers:
        x = fast_mamba.Norm.apply(hidden, layer.input_layernorm.weight, eps)
        if layer.mamba is not None:
            hidden = hidden + _mamba(layer.mamba, x, config)
        else:
            hidden = hidden + _attention(layer.self_attn, x)
        x = fast_mamba.Norm.apply(hidden, layer.post_attention_layernorm.weight, eps)
        inside = _swished(fast_mamba.linear(x, layer.shared_mlp.input_linear.weight))
        routed, unequal = _experts(layer.block_sparse_moe, x.flatten(0, 1))
        hidden = hidden + fast_mamba.linear(inside, layer.shared_mlp.output_linear.weight) + routed.view_as(x)
        imbalance = imbalance + unequal / len(backbone.layers)
    return fast_mamba.Norm.apply(hidden, backbone.norm.weight, eps), imbalance


def final_hidden(model: Any, tokens: Tensor) -> Tensor:
    """Hidden states after the final norm: (W, L) int64 -> (W, L, d_model)."""
    return _hidden(model, tokens)[0]


def loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of tokens[:, 1:] given their past, and BALANCE times the experts'
    imbalance; tokens (W, L + 1)."""
    hidden, imbalance = _hidden(model, tokens[:, :-1].contiguous())
    embedding = model.get_input_embeddings().weight
    value = fast_mamba.Loss.apply(hidden.flatten(0, 1), embedding, tokens[:, 1:].flatten())
    return value + BALANCE * imbalance
