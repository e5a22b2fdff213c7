"""The small models that transformers' own tests are made of, one for each supported model type.

Each row has the values that the `*ModelTester` of `tests/models/*/test_modeling_*.py` gives the configuration
class (huggingface/transformers, read in 2026). What a class does not know (`type_vocab_size`,
`attn_rotary_emb`), and what says nothing of a causal language model, is left out. `CHANGED` names the one
value that is another one here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from lively import lively
from pico_hybrids import louder
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from sparsessm.runtime.base import PURE

# What `CausalLMModelTester` (tests/causal_lm_tester.py) gives to every class that has such a field.
CAUSAL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "hidden_act": "silu",  # each of these families says so
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 36,
    "num_experts_per_tok": 2,
    "num_experts": 8,
}
ENDS = {"bos_token_id": 98, "eos_token_id": 98, "pad_token_id": 98}
MAMBA = ENDS | {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "tie_word_embeddings": True,
}
BAMBA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "mamba_n_groups": 1,
    "mamba_n_heads": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
GATED = {
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}

CHANGED = {"jamba": {"hidden_act": "gelu"}}
"""Jamba's tester has "gelu" where every published model has "silu". Its mixers take it too: it is refused."""

CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": ENDS
    | {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "n_groups": 8,
        "state_size": 2,
        "head_dim": 8,
        "conv_kernel": 4,
        "chunk_size": 8,
        "tie_word_embeddings": False,
    },
    "bamba": BAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": BAMBA,
    "granitemoehybrid": BAMBA
    | {
        "shared_intermediate_size": 174,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "use_cache": False,
    },
    "jamba": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "attn_layer_offset": 1,
        "attn_layer_period": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 37,
        "hidden_act": "silu",  # CHANGED
        "max_position_embeddings": 512,
        "num_experts": 2,
    },
    "nemotron_h": {
        "vocab_size": 99,
        "hidden_size": 32,
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 40,
        "max_position_embeddings": 512,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_n_groups": 8,
        "mamba_head_dim": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "zamba2": {
        "vocab_size": 99,
        "hidden_size": 16,
        "mamba_d_state": 2,
        "chunk_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "n_mamba_heads": 8,
        "mamba_ngroups": 8,
        "intermediate_size": 4,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
    "qwen3_5_text": CAUSAL
    | GATED
    | {
        "layer_types": ["full_attention", "linear_attention"],
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "qwen3_5_moe_text": CAUSAL | GATED | {"layer_types": ["full_attention", "linear_attention"]},
    "qwen3_next": CAUSAL | GATED | {"layer_types": ["linear_attention", "full_attention"]},
    "olmo_hybrid": CAUSAL
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": False,
    },
    "kimi_linear": CAUSAL
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_conv_kernel_dim": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 16,
        "num_local_experts": 8,  # n_routed_experts, which the class does not know: it would make 256
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""By model type."""


def stock_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A model of a row, with random weights; the same every time."""
    kind = CONFIG_MAPPING[model_type]
    fields = copy.deepcopy({**CONFIGURATIONS[model_type], **overrides})
    if fields.keys() >= CAUSAL.keys():  # its tester gives what the class has a word for
        known = signature(kind.__init__).parameters
        fields = {name: value for name, value in fields.items() if name in known or name not in CAUSAL}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # torch's grouped product, the stock default, refuses the 37 columns of Jamba's tester
        model = AutoModelForCausalLM.from_config(kind(**fields), experts_implementation="eager")
        return lively(model).eval() if model_type in PURE else louder(model)
