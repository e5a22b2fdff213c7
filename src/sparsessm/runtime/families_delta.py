"""The plans of the families of the gated delta rule, in the manner of `families.py`, which has their rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparsessm.architectures.attention import frequencies
from sparsessm.checkpoint.known_fields import optional
from sparsessm.runtime import usual
from sparsessm.runtime.base import model_type
from sparsessm.runtime.plan import Delta, Latent, Plan, Planned, Product, Rows


def qwen(config: Any) -> Plan:
    """Qwen3.5 and Qwen3-Next, with experts or without."""
    parts, (angles, turned) = [], frequencies(config, usual.width(config))
    for layer, kind in enumerate(config.layer_types):
        name = f"model.layers.{layer}"
        if kind == "full_attention":
            inner = f"{name}.self_attn"
            norms = {"q_norm": f"{inner}.q_norm.weight", "k_norm": f"{inner}.k_norm.weight"}
            first: Any = replace(usual.attention(config, inner, rotary=True), gated=True, **norms)
        else:
            first = _delta(config, f"{name}.linear_attn")
        parts.append(Planned(first, f"{name}.input_layernorm.weight"))
        inner, norm = f"{name}.mlp", f"{name}.post_attention_layernorm.weight"
        if not _mixture(config, layer):
            parts.append(Planned(usual.mlp(inner, config), norm))
            continue
        choice = "softmax_of_chosen" if optional(config, "norm_topk_prob", True) else "softmax"
        parts.append(Planned(usual.experts(inner, "gate", config, choice), norm))
        shared = replace(
            usual.mlp(f"{inner}.shared_expert", config), share=Product(f"{inner}.shared_expert_gate")
        )
        parts.append(Planned(shared, None, "before"))
    names = "model.embed_tokens.weight", "model.norm.weight"
    how: dict[str, Any] = {"angles": angles, "turned": turned, "centred": True}
    return Plan(*names, float(config.rms_norm_eps), parts, **how)


def olmo(config: Any) -> Plan:
    """OLMo-Hybrid: its attention is behind no norm, what it gives is."""
    rotary = (config.rope_parameters or {}).get("rope_theta") is not None
    parts, (angles, turned) = [], frequencies(config, usual.width(config)) if rotary else (None, 1.0)
    for layer, kind in enumerate(config.layer_types):
        name = f"model.layers.{layer}"
        mlp, middle = usual.mlp(f"{name}.mlp", config), f"{name}.post_attention_layernorm.weight"
        if kind == "linear_attention":
            parts.append(
                Planned(_olmo_delta(config, f"{name}.linear_attn"), f"{name}.input_layernorm.weight")
            )
            parts.append(Planned(mlp, middle))
            continue
        inner = f"{name}.self_attn"
        norms = {"q_norm": f"{inner}.q_norm.weight", "k_norm": f"{inner}.k_norm.weight"}
        attention = replace(usual.attention(config, inner, rotary=rotary), norm_whole=True, **norms)
        parts.append(Planned(attention, None, after=middle))
        parts.append(Planned(mlp, None, after=f"{name}.post_feedforward_layernorm.weight"))
    names = "model.embed_tokens.weight", "model.norm.weight"
    return Plan(*names, float(config.rms_norm_eps), parts, angles=angles, turned=turned)


def _olmo_delta(config: Any, name: str) -> Delta:
    q, k, v, gate, step, beta = (Rows(f"{name}.{kind}_proj") for kind in "qkvgab")
    sizes = (
        *(int(config.linear_num_key_heads), int(config.linear_key_head_dim)),
        *(int(config.linear_num_value_heads), int(config.linear_value_head_dim)),
        int(config.linear_conv_kernel_dim),
    )
    _refuse_activation(config)
    most = 2.0 if config.linear_allow_neg_eigval else 1.0
    ends = Product(f"{name}.o_proj"), f"{name}.o_norm.weight", 1e-5  # in the stock code
    return Delta(name, name, [q, k, v], gate, step, beta, *ends, *sizes, most)


def kimi(config: Any) -> Plan:
    """Kimi Linear (arXiv 2510.26692): Kimi Delta Attention or latent attention, then an MLP or experts."""
    parts: list[Planned] = []
    for layer, (kind, second) in enumerate(zip(config.layer_types, config.mlp_layer_types, strict=True)):
        name = f"model.layers.{layer}"
        mixer = _latent if kind == "full_attention" else _kimi_delta
        parts.append(Planned(mixer(config, f"{name}.self_attn"), f"{name}.input_layernorm.weight"))
        inner, norm = f"{name}.mlp", f"{name}.post_attention_layernorm.weight"
        if second != "sparse":
            parts.append(Planned(usual.mlp(inner, config), norm))
            continue
        parts.append(Planned(usual.sigmoid_experts(usual.experts(inner, "gate", config, ""), config), norm))
        parts.append(Planned(usual.mlp(f"{inner}.shared_experts", config), None, "before"))
    return Plan("model.embed_tokens.weight", "model.norm.weight", float(config.rms_norm_eps), parts)


def _kimi_delta(config: Any, name: str) -> Delta:
    _refuse_activation(config)
    q, k, v, beta = (Rows(f"{name}.{kind}_proj") for kind in "qkvb")
    forget = f"{name}.forget_gate"
    gate = Rows(f"{name}.g_b_proj", narrow=f"{name}.g_a_proj")
    step = Rows(f"{forget}.f_b_proj", narrow=f"{forget}.f_a_proj")
    heads, channels = int(config.linear_num_heads), int(config.linear_head_dim)
    sizes = heads, channels, heads, channels, int(config.linear_conv_kernel_dim)
    ends = Product(f"{name}.o_proj"), f"{name}.o_norm.weight", float(config.rms_norm_eps)
    how: dict[str, Any] = {"by_channel": True, "curve": "sigmoid"}
    return Delta(name, forget, [q, k, v], gate, step, beta, *ends, *sizes, **how)


def _latent(config: Any, name: str) -> Latent:
    heads, shared = int(config.num_attention_heads), int(config.num_key_value_heads)
    if heads != shared:
        raise ValueError(
            f"num_key_value_heads is {shared} and num_attention_heads {heads}; latent attention needs as many"
        )
    narrow = config.q_lora_rank is not None
    own, common = int(config.qk_nope_head_dim), int(config.qk_rope_head_dim)
    return Latent(
        narrow=Product(f"{name}.q_a_proj") if narrow else None,
        q=Product(f"{name}.q_b_proj" if narrow else f"{name}.q_proj"),
        row=Product(f"{name}.kv_a_proj_with_mqa"),
        wide=Product(f"{name}.kv_b_proj"),
        o=Product(f"{name}.o_proj"),
        heads=heads,
        rank=int(config.kv_lora_rank),
        common=common,
        own=own,
        width=int(config.v_head_dim),
        scale=(own + common) ** -0.5,
        q_norm=f"{name}.q_a_layernorm.weight" if narrow else "",
        norm=f"{name}.kv_a_layernorm.weight",
        epsilon=1e-6,  # in the stock code
    )


def _refuse_activation(config: Any) -> None:
    """Check what follows the convolution of a mixer of the delta rule.

    Raises:
        ValueError: an activation other than SiLU.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {config.hidden_act!r}; supported: 'silu'")


def _mixture(config: Any, layer: int) -> bool:
    """Whether a layer of Qwen's has experts."""
    if model_type(config) == "qwen3_next":
        some = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        return some and layer not in config.mlp_only_layers
    return model_type(config) == "qwen3_5_moe_text"


def _delta(config: Any, name: str) -> Delta:
    """The mixer of Qwen3.5, or of Qwen3-Next, whose matrices have all of a group of heads side by side."""
    _refuse_activation(config)
    groups, heads = int(config.linear_num_key_heads), int(config.linear_num_value_heads)
    keys, channels = int(config.linear_key_head_dim), int(config.linear_value_head_dim)
    if model_type(config) == "qwen3_next":
        many = heads // groups
        wide = torch.arange(groups * 2 * (keys + many * channels)).view(groups, -1)
        q, k, v, z = (x.flatten() for x in wide.split([keys, keys, many * channels, many * channels], 1))
        b, a = (x.flatten() for x in torch.arange(2 * heads).view(groups, -1).chunk(2, 1))
        whole, both = f"{name}.in_proj_qkvz", f"{name}.in_proj_ba"
        mixed, gate = [Rows(whole, torch.cat([q, k, v]))], Rows(whole, z)
        step, beta = Rows(both, a), Rows(both, b)
    else:
        mixed, gate = [Rows(f"{name}.in_proj_qkv")], Rows(f"{name}.in_proj_z")
        step, beta = Rows(f"{name}.in_proj_a"), Rows(f"{name}.in_proj_b")
    sizes = groups, keys, heads, channels, int(config.linear_conv_kernel_dim)
    out, norm = Product(f"{name}.out_proj"), f"{name}.norm.weight"
    return Delta(name, name, mixed, gate, step, beta, out, norm, float(config.rms_norm_eps), *sizes)
