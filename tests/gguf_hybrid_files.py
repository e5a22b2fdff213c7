"""What llama.cpp's converter makes of hybrids, transcribed family by family (conversion/granite.py, jamba.py,
falcon_h1.py and nemotron.py); files that were made so gave the logits of transformers in llama.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAMBA2 = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
ATTENTION = {
    "q_proj.weight": "attn_q.weight",
    "k_proj.weight": "attn_k.weight",
    "v_proj.weight": "attn_v.weight",
    "o_proj.weight": "attn_output.weight",
}
PLAIN = {f"{one}_proj.weight": f"ffn_{one}.weight" for one in ("gate", "up", "down")}
Tensors = dict[str, Tensor]


def pairs(weight: Tensor, heads: int, turned: int) -> Tensor:
    """Rows i and i + turned / 2 of a head become 2i and 2i + 1."""
    found, each = weight.clone(), len(weight) // heads
    for head in range(heads):
        for i in range(turned // 2):
            found[head * each + 2 * i] = weight[head * each + i]
            found[head * each + 2 * i + 1] = weight[head * each + turned // 2 + i]
    return found


def mixer(config: Any, state: Tensors, prefix: str, block: str, groups: int, old: str = "") -> Tensors:
    """Those of a Mamba-2 mixer."""
    found = {}
    for name, short in MAMBA2.items():
        value = state.get(f"{prefix}.{name}")
        if value is None:
            if name == "conv1d.bias":
                found[f"{block}.{short}"] = torch.zeros(len(state[f"{prefix}.conv1d.weight"]))
            continue
        if name == "conv1d.weight":
            value = value[:, 0]
        if name == "A_log":
            value = -torch.exp(value)
        if name in ("A_log", "D"):
            value = value[:, None]
        if name == "norm.weight":
            value = value.reshape(groups, -1)
        found[f"{block}.{short}"] = value
    return found


def attention(config: Any, state: Tensors, prefix: str, block: str, turned: int) -> Tensors:
    found = {f"{block}.{short}": state[f"{prefix}.{name}"] for name, short in ATTENTION.items()}
    if turned:
        for one, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            found[f"{block}.attn_{one}.weight"] = pairs(found[f"{block}.attn_{one}.weight"], heads, turned)
    return found


def experts(state: Tensors, prefix: str, block: str) -> Tensors:
    gate, up = state[f"{prefix}.experts.gate_up_proj"].chunk(2, 1)
    return {
        f"{block}.ffn_gate_inp.weight": state[f"{prefix}.router.weight"],
        f"{block}.ffn_gate_exps.weight": gate,
        f"{block}.ffn_up_exps.weight": up,
        f"{block}.ffn_down_exps.weight": state[f"{prefix}.experts.down_proj"],
    }


def bamba(config: Any, state: Tensors, layer: str, block: str) -> Tensors:
    found = {
        f"{block}.attn_norm.weight": state[f"{layer}.input_layernorm.weight"],
        f"{block}.ffn_norm.weight": state[f"{layer}.pre_ff_layernorm.weight"],
        **{f"{block}.{short}": state[f"{layer}.feed_forward.{name}"] for name, short in PLAIN.items()},
    }
    if f"{layer}.mamba.A_log" in state:
        return found | mixer(config, state, f"{layer}.mamba", block, config.mamba_n_groups)
    each = config.hidden_size // config.num_attention_heads
    turned = int(each * config.rope_parameters["partial_rotary_factor"])
    return found | attention(config, state, f"{layer}.self_attn", block, turned)


def granitemoehybrid(config: Any, state: Tensors, layer: str, block: str) -> Tensors:
    shared = "_shexp" if config.num_local_experts else ""
    gate, up = state[f"{layer}.shared_mlp.input_linear.weight"].chunk(2)
    found = {
        f"{block}.attn_norm.weight": state[f"{layer}.input_layernorm.weight"],
        f"{block}.ffn_norm.weight": state[f"{layer}.post_attention_layernorm.weight"],
        f"{block}.ffn_gate{shared}.weight": gate,
        f"{block}.ffn_up{shared}.weight": up,
        f"{block}.ffn_down{shared}.weight": state[f"{layer}.shared_mlp.output_linear.weight"],
    }
    if shared:
        found |= experts(state, f"{layer}.block_sparse_moe", block)
    if f"{layer}.mamba.A_log" in state:
        return found | mixer(config, state, f"{layer}.mamba", block, config.mamba_n_groups)
    each = config.hidden_size // config.num_attention_heads
    turned = each if config.position_embedding_type == "rope" else 0
    return found | attention(config, state, f"{layer}.self_attn", block, turned)


def jamba(config: Any, state: Tensors, layer: str, block: str) -> Tensors:
    found = {
        f"{block}.attn_norm.weight": state[f"{layer}.input_layernorm.weight"],
        f"{block}.ffn_norm.weight": state[f"{layer}.pre_ff_layernorm.weight"],
    }
    if f"{layer}.feed_forward.router.weight" in state:
        found |= experts(state, f"{layer}.feed_forward", block)
    else:
        found |= {f"{block}.{short}": state[f"{layer}.feed_forward.{name}"] for name, short in PLAIN.items()}
    if f"{layer}.mamba.A_log" not in state:
        return found | attention(config, state, f"{layer}.self_attn", block, 0)
    names = {
        **{name: short for name, short in MAMBA2.items() if name not in ("dt_bias", "norm.weight")},
        "x_proj.weight": "ssm_x.weight",
        "dt_proj.weight": "ssm_dt.weight",
        "dt_proj.bias": "ssm_dt.bias",
        **{f"{one}_layernorm.weight": f"ssm_{one}_norm.weight" for one in ("dt", "b", "c")},
    }
    for name, short in names.items():
        value = state.get(f"{layer}.mamba.{name}")
        if value is None:
            value = torch.zeros(len(state[f"{layer}.mamba.conv1d.weight"]))
        value = value[:, 0] if name == "conv1d.weight" else -torch.exp(value) if name == "A_log" else value
        found[f"{block}.{short}"] = value
    return found


def falcon_h1(config: Any, state: Tensors, layer: str, block: str) -> Tensors:
    heads, groups = config.mamba_n_heads, config.mamba_n_groups
    inner, states = heads * config.mamba_d_head, groups * config.mamba_d_state
    found = {
        f"{block}.attn_norm.weight": state[f"{layer}.input_layernorm.weight"],
        f"{block}.ffn_norm": state[f"{layer}.pre_ff_layernorm.weight"],
        **{f"{block}.{short}": state[f"{layer}.feed_forward.{name}"] for name, short in PLAIN.items()},
        **mixer(config, state, f"{layer}.mamba", block, groups),
        **attention(config, state, f"{layer}.self_attn", block, 0),
    }
    for short, factor in (
        ("ffn_gate", config.mlp_multipliers[0]),
        ("ffn_down", config.mlp_multipliers[1]),
        ("attn_q", config.attention_in_multiplier),
        ("attn_k", config.attention_in_multiplier * config.key_multiplier),
        ("attn_v", config.attention_in_multiplier),
        ("attn_output", config.attention_out_multiplier),
        ("ssm_out", config.ssm_out_multiplier),
        ("ssm_in", config.ssm_in_multiplier),
    ):
        found[f"{block}.{short}.weight"] = found[f"{block}.{short}.weight"] * factor
    rows = found[f"{block}.ssm_in.weight"].split([inner, inner, states, states, heads])
    scaled = [part * factor for part, factor in zip(rows, config.ssm_multipliers, strict=True)]
    found[f"{block}.ssm_in.weight"] = torch.cat(scaled)
    return found


def nemotron_h(config: Any, state: Tensors, layer: str, block: str) -> Tensors:
    found = {f"{block}.attn_norm.weight": state[f"{layer}.norm.weight"]}
    inside = f"{layer}.mixer"
    if f"{inside}.A_log" in state:
        return found | mixer(config, state, inside, block, config.n_groups)
    if f"{inside}.q_proj.weight" in state:
        return found | attention(config, state, inside, block, 0)
    if f"{inside}.up_proj.weight" in state:
        return found | {f"{block}.{PLAIN[n]}": state[f"{inside}.{n}"] for n in PLAIN if "gate" not in n}
    return found | {
        f"{block}.ffn_gate_inp.weight": state[f"{inside}.gate.weight"],
        f"{block}.exp_probs_b.bias": state[f"{inside}.gate.e_score_correction_bias"],
        f"{block}.ffn_up_exps.weight": state[f"{inside}.experts.up_proj"],
        f"{block}.ffn_down_exps.weight": state[f"{inside}.experts.down_proj"],
        f"{block}.ffn_up_shexp.weight": state[f"{inside}.shared_experts.up_proj.weight"],
        f"{block}.ffn_down_shexp.weight": state[f"{inside}.shared_experts.down_proj.weight"],
    }


LAYERS = {row.__name__: row for row in (bamba, granitemoehybrid, jamba, falcon_h1, nemotron_h)}


def expected(model: Any) -> Tensors:
    """What the file must hold of a stock model, in float32."""
    config, state = model.config, {name: value.detach().float() for name, value in model.state_dict().items()}
    embedding = state[
        "model.embeddings.weight" if config.model_type == "nemotron_h" else "model.embed_tokens.weight"
    ]
    (norm,) = (
        name for name in state if name in {f"model.{n}.weight" for n in ("norm", "norm_f", "final_layernorm")}
    )
    found = {"token_embd.weight": embedding, "output_norm.weight": state[norm]}
    if config.model_type == "falcon_h1":
        found["token_embd.weight"] = embedding * config.embedding_multiplier
        found["output.weight"] = state["lm_head.weight"] * config.lm_head_multiplier
    elif not config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    for at in range(config.num_hidden_layers):
        found |= LAYERS[config.model_type](config, state, f"model.layers.{at}", f"blk.{at}")
    return found
