"""`config.json` of published models, as they stand on the hub.

The tests reach no hub, so the values are typed from places that quote them. Each entry says which, and what
could not be confirmed; `BILLIONS` holds it against the number of parameters that its publisher tells.
`published_small.py` has small checkpoints of the same form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    # The copy of it that plant-dnamamba quotes; layers and the vocabulary from its pages. The fields of the
    # original format stand beside those of transformers.
    "state-spaces/mamba-130m-hf": json.loads(
        """
        {"architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
        "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": true, "hidden_act": "silu",
        "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon":
        1e-05, "model_type": "mamba", "n_layer": 24, "numb_hidden_layers": 24, "num_hidden_layers": 24,
        "pad_token_id": 0, "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": false,
        "residual_in_fp32": true, "rms_norm": true, "ssm_cfg": {}, "state_size": 16, "time_step_floor":
        0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "use_bias": false,
        "use_cache": true, "use_conv_bias": true, "vocab_size": 50280}
        """
    ),
    # mlstm_kernels (NX-AI), its benchmark of models on the hub.
    "tiiuae/falcon-mamba-7b": json.loads(
        """
        {"_name_or_path": "./", "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0,
        "conv_kernel": 4, "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type":
        "falcon_mamba", "num_hidden_layers": 64, "pad_token_id": 11, "rescale_prenorm_residual": false,
        "residual_in_fp32": true, "state_size": 16, "tie_word_embeddings": false, "time_step_floor":
        0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16", "use_bias": false,
        "use_cache": true, "use_conv_bias": true, "vocab_size": 65024}
        """
    ),
    # The same place; the size of the vocabulary from the defaults of Mamba2Config.
    "mistralai/Mamba-Codestral-7B-v0.1": json.loads(
        """
        {"architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4,
        "eos_token_id": 0, "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type":
        "mamba2", "n_groups": 8, "norm_before_gate": true, "num_heads": 128, "num_hidden_layers": 64,
        "pad_token_id": 0, "rescale_prenorm_residual": false, "residual_in_fp32": true, "rms_norm":
        true, "state_size": 128, "tie_word_embeddings": false, "time_step_floor": 0.0001,
        "time_step_init_scheme": "random", "time_step_limit": [0.0, Infinity], "time_step_max": 0.1,
        "time_step_min": 0.001, "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype":
        "bfloat16", "use_bias": false, "use_cache": true, "use_conv_bias": true, "vocab_size": 32768}
        """
    ),
    # Shapes and pattern from a script of Model-Optimizer (NVIDIA) and a test that quotes them; the other
    # fields are those of Nemotron 3 Nano. Not confirmed: attention_head_dim, rms_norm_eps, time_step_limit.
    "nvidia/Nemotron-H-8B-Base-8K": json.loads(
        """
        {"architectures": ["NemotronHForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attention_head_dim": 128, "auto_map": {"AutoConfig":
        "configuration_nemotron_h.NemotronHConfig", "AutoModelForCausalLM":
        "modeling_nemotron_h.NemotronHForCausalLM"}, "bos_token_id": 1, "chunk_size": 128,
        "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "hidden_dropout": 0.0, "hidden_size": 4096,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "initializer_range": 0.02, "intermediate_size": 21504, "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 128, "mamba_proj_bias":
        false, "max_position_embeddings": 8192, "mlp_bias": false, "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h", "n_groups": 8, "num_attention_heads": 32, "num_hidden_layers": 52,
        "num_key_value_heads": 8, "num_logits_to_keep": 1, "pad_token_id": 0,
        "rescale_prenorm_residual": true, "residual_in_fp32": false, "rms_norm_eps": 1e-05,
        "sliding_window": null, "ssm_state_size": 128, "tie_word_embeddings": false, "time_step_floor":
        0.0001, "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.001,
        "torch_dtype": "bfloat16", "use_bias": false, "use_cache": true, "use_conv_bias": true,
        "use_mamba_kernels": true, "vocab_size": 131072}
        """
    ),
    # Shapes and pattern from Megatron-Bridge's recipe (NVIDIA-NeMo); the other fields as above, and as
    # little confirmed.
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": json.loads(
        """
        {"architectures": ["NemotronHForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig", "AutoModelForCausalLM":
        "modeling_nemotron_h.NemotronHForCausalLM"}, "bos_token_id": 1, "chunk_size": 128,
        "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0,
        "hidden_size": 4480, "hybrid_override_pattern":
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", "initializer_range": 0.02,
        "intermediate_size": 15680, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 80,
        "mamba_hidden_act": "silu", "mamba_num_heads": 128, "mamba_proj_bias": false,
        "max_position_embeddings": 131072, "mlp_bias": false, "mlp_hidden_act": "relu2", "model_type":
        "nemotron_h", "n_groups": 8, "num_attention_heads": 40, "num_hidden_layers": 56,
        "num_key_value_heads": 8, "num_logits_to_keep": 1, "pad_token_id": 0,
        "rescale_prenorm_residual": true, "residual_in_fp32": false, "rms_norm_eps": 1e-05,
        "sliding_window": null, "ssm_state_size": 128, "tie_word_embeddings": false, "time_step_floor":
        0.0001, "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.001,
        "torch_dtype": "bfloat16", "use_bias": false, "use_cache": true, "use_conv_bias": true,
        "use_mamba_kernels": true, "vocab_size": 131072}
        """
    ),
    # jax-llm-examples (Google), a test that quotes the whole file.
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": json.loads(
        """
        {"architectures": ["NemotronHForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig", "AutoModelForCausalLM":
        "modeling_nemotron_h.NemotronHForCausalLM"}, "bos_token_id": 1, "chunk_size": 128,
        "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0,
        "hidden_size": 2688, "hybrid_override_pattern":
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "initializer_range": 0.02,
        "intermediate_size": 1856, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64,
        "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": false,
        "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "mlp_bias": false,
        "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "n_groups": 8, "n_routed_experts":
        128, "n_shared_experts": 1, "norm_eps": 1e-05, "norm_topk_prob": true, "num_attention_heads":
        32, "num_experts_per_tok": 6, "num_hidden_layers": 52, "num_key_value_heads": 2,
        "num_logits_to_keep": 1, "pad_token_id": 0, "partial_rotary_factor": 1.0,
        "rescale_prenorm_residual": true, "residual_in_fp32": false, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "sliding_window": null, "ssm_state_size": 128,
        "tie_word_embeddings": false, "time_step_floor": 0.0001, "time_step_max": 0.1, "time_step_min":
        0.001, "topk_group": 1, "torch_dtype": "bfloat16", "use_bias": false, "use_cache": true,
        "use_conv_bias": true, "use_mamba_kernels": true, "vocab_size": 131072}
        """
    ),
    # mlxcel (Lablup), a test that quotes what its reader needs.
    "ibm-granite/granite-4.0-h-350m": json.loads(
        """
        {"architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": false, "attention_dropout":
        0.0, "attention_multiplier": 0.015625, "bos_token_id": 100257, "embedding_multiplier": 12,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 768, "init_method": "mup",
        "intermediate_size": 2048, "layer_types": ["mamba", "mamba", "mamba", "mamba", "mamba", "mamba",
        "mamba", "mamba", "mamba", "mamba", "attention", "mamba", "mamba", "attention", "mamba",
        "mamba", "mamba", "attention", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba",
        "mamba", "mamba", "attention", "mamba", "mamba", "mamba", "mamba"], "logits_scaling": 3,
        "mamba_chunk_size": 256, "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_head": 32,
        "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48,
        "mamba_proj_bias": false, "max_position_embeddings": 32768, "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm", "num_attention_heads": 12, "num_experts_per_tok": 0,
        "num_hidden_layers": 32, "num_key_value_heads": 4, "num_local_experts": 0, "pad_token_id":
        100256, "position_embedding_type": "nope", "residual_multiplier": 0.246, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 10000, "shared_intermediate_size": 2048,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 100352}
        """
    ),
    # Widths, experts and multipliers of the embedding, attention and logits are quoted in several places. Not
    # confirmed: which layers attend, and the width of the shared MLP.
    "ibm-granite/granite-4.0-h-tiny": json.loads(
        """
        {"architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": false, "attention_dropout":
        0.0, "attention_multiplier": 0.0078125, "bos_token_id": 100257, "embedding_multiplier": 12,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 1536, "init_method": "mup",
        "intermediate_size": 512, "layer_types": ["mamba", "mamba", "mamba", "mamba", "mamba",
        "attention", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba",
        "attention", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba",
        "attention", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba", "mamba",
        "attention", "mamba", "mamba", "mamba", "mamba"], "logits_scaling": 6, "mamba_chunk_size": 256,
        "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128,
        "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_proj_bias": false,
        "max_position_embeddings": 131072, "model_type": "granitemoehybrid", "normalization_function":
        "rmsnorm", "num_attention_heads": 12, "num_experts_per_tok": 6, "num_hidden_layers": 40,
        "num_key_value_heads": 4, "num_local_experts": 64, "output_router_logits": false,
        "pad_token_id": 100256, "position_embedding_type": "nope", "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000, "router_aux_loss_coef": 0.0,
        "shared_intermediate_size": 1024, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "vocab_size": 100352}
        """
    ),
    # Megatron-Bridge (NVIDIA-NeMo), a test that quotes the whole file.
    "tiiuae/Falcon-H1-0.5B-Base": json.loads(
        """
        {"architectures": ["FalconH1ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "attn_layer_indices": null,
        "embedding_multiplier": 5.656854249492381, "head_dim": 64, "hidden_act": "silu", "hidden_size":
        1024, "initializer_range": 0.02, "intermediate_size": 2048, "key_multiplier":
        0.39062499999999994, "lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128,
        "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_ssm": 1536,
        "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24,
        "mamba_norm_before_gate": false, "mamba_proj_bias": false, "mamba_rms_norm": false,
        "mamba_use_mlp": true, "max_position_embeddings": 16384, "mlp_bias": false, "mlp_multipliers":
        [0.8838834764831844, 0.5859375], "model_type": "falcon_h1", "num_attention_heads": 8,
        "num_hidden_layers": 36, "num_key_value_heads": 2, "projectors_bias": false, "rms_norm_eps":
        1e-05, "rope_scaling": null, "rope_theta": 100000000000.0, "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        "ssm_out_multiplier": 0.23570226039551587, "tie_word_embeddings": false, "torch_dtype":
        "bfloat16", "vocab_size": 32784}
        """
    ),
    # What the conversion script of transformers writes, with the layers that attend from two places. The size
    # of the vocabulary is not confirmed.
    "ibm-ai-platform/Bamba-9B": json.loads(
        """
        {"architectures": ["BambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_indices": [9, 18,
        27], "attn_rotary_emb": 64, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act":
        "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "mamba_chunk_size": 256, "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_head": 64,
        "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128,
        "mamba_proj_bias": false, "max_position_embeddings": 262144, "model_type": "bamba",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_logits_to_keep": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": false, "torch_dtype":
        "bfloat16", "use_cache": true, "vocab_size": 128256}
        """
    ),
    # A trace of the published file under transformers 5: 38 layers, 406 tensors with adapters in attention.
    "Zyphra/Zamba2-1.2B": json.loads(
        """
        {"adapter_rank": 128, "add_bias_linear": false, "architectures": ["Zamba2ForCausalLM"],
        "attention_dropout": 0.0, "chunk_size": 256, "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "layers_block_type": ["mamba", "mamba", "mamba", "mamba", "mamba",
        "hybrid", "mamba", "mamba", "mamba", "mamba", "mamba", "hybrid", "mamba", "mamba", "mamba",
        "mamba", "mamba", "hybrid", "mamba", "mamba", "mamba", "mamba", "mamba", "hybrid", "mamba",
        "mamba", "mamba", "mamba", "mamba", "hybrid", "mamba", "mamba", "mamba", "mamba", "mamba",
        "hybrid", "mamba", "mamba"], "mamba_d_conv": 4, "mamba_d_state": 128, "mamba_expand": 2,
        "mamba_headdim": 64, "mamba_ngroups": 1, "max_position_embeddings": 4096, "model_type":
        "zamba2", "n_mamba_heads": 64, "num_attention_heads": 32, "num_hidden_layers": 38,
        "num_key_value_heads": 32, "num_logits_to_keep": 1, "num_mem_blocks": 1, "rms_norm_eps": 1e-05,
        "rope_theta": 10000, "torch_dtype": "bfloat16", "use_cache": true, "use_conv_bias": true,
        "use_mamba_kernels": true, "use_mem_rope": true, "use_shared_attention_adapter": true,
        "vocab_size": 32000}
        """
    ),
    # "A Zamba2-2.7B style configuration" are the defaults of Zamba2Config. Heads and blocks: not confirmed.
    "Zyphra/Zamba2-2.7B": json.loads(
        """
        {"adapter_rank": 128, "add_bias_linear": false, "architectures": ["Zamba2ForCausalLM"],
        "attention_dropout": 0.0, "chunk_size": 256, "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 10240, "layers_block_type": ["mamba", "mamba", "mamba", "mamba", "mamba",
        "mamba", "hybrid", "mamba", "mamba", "mamba", "mamba", "mamba", "hybrid", "mamba", "mamba",
        "mamba", "mamba", "mamba", "hybrid", "mamba", "mamba", "mamba", "mamba", "mamba", "hybrid",
        "mamba", "mamba", "mamba", "mamba", "mamba", "hybrid", "mamba", "mamba", "mamba", "mamba",
        "mamba", "hybrid", "mamba", "mamba", "mamba", "mamba", "mamba", "hybrid", "mamba", "mamba",
        "mamba", "mamba", "hybrid", "mamba", "mamba", "mamba", "hybrid", "mamba", "mamba"],
        "mamba_d_conv": 4, "mamba_d_state": 64, "mamba_expand": 2, "mamba_headdim": 64, "mamba_ngroups":
        1, "max_position_embeddings": 4096, "model_type": "zamba2", "n_mamba_heads": 80,
        "num_attention_heads": 32, "num_hidden_layers": 54, "num_key_value_heads": 32,
        "num_logits_to_keep": 1, "num_mem_blocks": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000,
        "torch_dtype": "bfloat16", "use_cache": true, "use_conv_bias": true, "use_mamba_kernels": true,
        "use_mem_rope": false, "use_shared_attention_adapter": false, "vocab_size": 32000}
        """
    ),
    # The file of 1.5-Mini; the older fields and the code of the first release are not confirmed.
    "ai21labs/Jamba-v0.1": json.loads(
        """
        {"architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4,
        "attn_layer_period": 8, "auto_map": {"AutoConfig": "configuration_jamba.JambaConfig",
        "AutoModelForCausalLM": "modeling_jamba.JambaForCausalLM"}, "bos_token_id": 1,
        "calc_logits_for_entire_prompt": false, "eos_token_id": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_state": 16,
        "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_inner_layernorms": true, "mamba_proj_bias":
        false, "max_position_embeddings": 262144, "model_type": "jamba", "n_ctx": 262144,
        "num_attention_heads": 32, "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_logits_to_keep": 1, "output_router_logits": false,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_mamba_kernels":
        true, "vocab_size": 65536}
        """
    ),
    # onnx-diagnostic (sdpython), which quotes the whole file.
    "ai21labs/AI21-Jamba-1.5-Mini": json.loads(
        """
        {"architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4,
        "attn_layer_period": 8, "bos_token_id": 1, "eos_token_id": [2, 518], "expert_layer_offset": 1,
        "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_state": 16,
        "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_proj_bias": false, "max_position_embeddings":
        262144, "model_type": "jamba", "num_attention_heads": 32, "num_experts": 16,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_logits_to_keep": 1, "output_router_logits": false, "pad_token_id": 0, "rms_norm_eps":
        1e-06, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "use_mamba_kernels": true, "vocab_size": 65536}
        """
    ),
    # From its card: 26 layers of Mamba and 2 of attention, 20 heads that share one of keys. Widths and the
    # numbers of the two are not confirmed.
    "ai21labs/AI21-Jamba2-3B": json.loads(
        """
        {"architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 7,
        "attn_layer_period": 14, "bos_token_id": 1, "eos_token_id": [2, 519], "expert_layer_offset": 1,
        "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 8192, "mamba_conv_bias": true, "mamba_d_conv": 4, "mamba_d_state": 16,
        "mamba_dt_rank": 160, "mamba_expand": 2, "mamba_proj_bias": false, "max_position_embeddings":
        262144, "model_type": "jamba", "num_attention_heads": 20, "num_experts": 1,
        "num_experts_per_tok": 1, "num_hidden_layers": 28, "num_key_value_heads": 1,
        "num_logits_to_keep": 1, "output_router_logits": false, "pad_token_id": 0, "rms_norm_eps":
        1e-06, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "use_mamba_kernels": true, "vocab_size": 65536}
        """
    ),
}
"""By hub id."""

BILLIONS: Mapping[str, float] = {
    "state-spaces/mamba-130m-hf": 0.13,
    "tiiuae/falcon-mamba-7b": 7.27,
    "mistralai/Mamba-Codestral-7B-v0.1": 7.29,
    "nvidia/Nemotron-H-8B-Base-8K": 8.1,
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": 8.89,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31.6,
    "ibm-granite/granite-4.0-h-350m": 0.34,
    "ibm-granite/granite-4.0-h-tiny": 7,
    "tiiuae/Falcon-H1-0.5B-Base": 0.52,
    "ibm-ai-platform/Bamba-9B": 9.78,
    "Zyphra/Zamba2-1.2B": 1.22,
    "Zyphra/Zamba2-2.7B": 2.7,
    "ai21labs/Jamba-v0.1": 52,
    "ai21labs/AI21-Jamba-1.5-Mini": 52,
    "ai21labs/AI21-Jamba2-3B": 3,
}
"""Parameters, as the publishers count them on their pages."""

WRAPPED = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
OLDER = ("qwen3_next", "kimi_linear")
"""The published forms of the delta rule (tests/checkpoint/test_published.py): inside a model for pictures, by
the type of the whole; and types with older names of fields."""
