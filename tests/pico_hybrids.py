"""Pico hybrids: the stock families of attention and recurrent layers, small, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NEW = int(transformers.__version__.split(".")[0]) >= 5  # the first release whose hybrids are these
COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # Layers: Mamba, attention with experts, Mamba, attention's period over: Mamba with experts.
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 3,
    },
    # One shared block, used twice.
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
    },
    "bamba": MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": MAMBA2
    | {
        "num_hidden_layers": 2,
        "mamba_d_ssm": 24,
        "mamba_n_heads": 6,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.8, 1.3],
        "key_multiplier": 0.7,
        "attention_in_multiplier": 1.1,
        "attention_out_multiplier": 0.9,
        "ssm_multipliers": [1.2, 0.8, 1.1, 0.9, 1.3],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.75,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "head_dim": 4,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
    },
    "granitemoehybrid": MAMBA2
    | {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 20,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
    },
    "qwen3_5_text": DELTA
    | {
        "rope_parameters": DELTA["rope_parameters"] | {"mrope_interleaved": True, "mrope_section": [1, 1, 0]},
    },
    "qwen3_5_moe_text": DELTA
    | EXPERTS
    | {
        "rope_parameters": DELTA["rope_parameters"] | {"mrope_interleaved": True, "mrope_section": [1, 1, 0]},
    },
    "qwen3_next": DELTA | EXPERTS | {"mlp_only_layers": [1]},
    "olmo_hybrid": DELTA
    | {
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": None},
    },
    "kimi_linear": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
}

# Long tests take one of those that are alike to them: the delta rule with experts, and the one whose decays
# differ by channel, for all models of that rule.
DISTINCT = [name for name in FAMILIES if name not in ("qwen3_5_text", "qwen3_next", "olmo_hybrid")]

# Other options of the same families: name -> (family, what differs).
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "jamba-dense": ("jamba", {"num_experts": 1, "mamba_proj_bias": True, "mamba_conv_bias": False}),
    "jamba-tied": ("jamba", {"tie_word_embeddings": True, "num_experts_per_tok": 1, "mamba_expand": 3}),
    "jamba-eager": ("jamba", {"attn_implementation": "eager", "experts_implementation": "eager"}),
    "zamba2-two-blocks": (
        "zamba2",
        {
            "num_hidden_layers": 6,
            "layers_block_type": [*["linear_attention", "hybrid"], *["hybrid"] * 3, "linear_attention"],
            "num_mem_blocks": 2,
            "use_mem_rope": True,
            "num_key_value_heads": 2,
            "use_shared_attention_adapter": False,
            "add_bias_linear": True,
        },
    ),
    "zamba2-no-adapters": (
        "zamba2",
        {"use_shared_attention_adapter": False, "tie_word_embeddings": False, "hidden_act": "silu"},
    ),
    "zamba2-rope-eager": ("zamba2", {"use_mem_rope": True, "attn_implementation": "eager"}),
    "bamba-biased": (
        "bamba",
        {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False,
         "attn_layer_indices": [0, 2], "tie_word_embeddings": True, "time_step_limit": [0.1, 0.6]},
    ),
    "falcon_h1-normed": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "attention_bias": True, "mlp_bias": True},
    ),
    "falcon_h1-normed-after": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "projectors_bias": True,
         "mamba_proj_bias": True, "tie_word_embeddings": True, "mamba_d_ssm": None, "mamba_n_heads": 8},
    ),
    "nemotron_h-latent": (
        "nemotron_h",
        {"moe_latent_size": 8, "mlp_bias": True, "n_group": 2, "routed_scaling_factor": 2.5, "use_bias": True,
         "norm_topk_prob": False},
    ),
    "granite-dense": ("granitemoehybrid", {"num_local_experts": 0, "tie_word_embeddings": True}),
    "granite-rope": (
        "granitemoehybrid",
        {"position_embedding_type": "rope", "attention_bias": True, "mamba_proj_bias": True,
         "experts_implementation": "eager"},
    ),
    "qwen3_5-tied": (
        "qwen3_5_text",
        {"tie_word_embeddings": True, "attention_bias": True, "linear_num_value_heads": 2,
         "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    ),
    "qwen3_next-dense": ("qwen3_next", {"num_experts": 0, "linear_num_value_heads": 6}),
    "olmo_hybrid-rope": (
        "olmo_hybrid",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "attention_bias": True,
         "linear_allow_neg_eigval": False, "num_key_value_heads": 4},
    ),
    "kimi_linear-latent": ("kimi_linear", {"q_lora_rank": 8, "n_group": 2, "topk_group": 1,
                                           "routed_scaling_factor": 2.5, "norm_topk_prob": False}),
}  # fmt: skip


def pico_hybrid(name: str, **overrides: Any) -> PreTrainedModel:
    """A model of one of the families or variants; the same weights every time."""
    family, differs = VARIANTS.get(name, (name, {}))
    fields = copy.deepcopy(COMMON | FAMILIES[family] | differs | overrides)
    how = {key: fields.pop(key) for key in ("attn_implementation", "experts_implementation") if key in fields}
    config = AutoConfig.for_model(family, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return louder(AutoModelForCausalLM.from_config(config, **how))


@torch.no_grad()
def louder(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with weights at which every part of a layer reaches the logits, ready to run."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith("A_log"):  # norms, biases, A_log, D
            parameter.add_(0.1 * torch.randn_like(parameter))  # away from their regular start values
        else:
            parameter.mul_(4 if "conv1d" in name else 8)
        if name.endswith("dt_bias"):  # middling steps and slow decay: states that remember
            parameter.copy_(0.3 * torch.randn_like(parameter) - 1)
        elif name.endswith("A_log") and parameter.ndim == 1:
            parameter.sub_(2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.05 * torch.randn_like(buffer))
    return model.eval()
