"""Small checkpoints of the form of published ones: their fields but for the sizes in `SMALL`, two shards, and
the files of code that directories of models have which came before transformers knew their type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lively import lively
from pico import pico_tokenizer
from pico_hybrids import louder
from published import PUBLISHED
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sparsessm.runtime.base import PURE

_IDS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_HEADS = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
_NEMOTRON = _HEADS | {
    "hybrid_override_pattern": "M-M*M-",
    "num_hidden_layers": 6,
    "intermediate_size": 24,
    "head_dim": 4,
    "mamba_num_heads": 16,
    "mamba_head_dim": 2,
    "ssm_state_size": 8,
    "chunk_size": 16,
}
_GRANITE = _HEADS | {
    "layer_types": ["mamba", "attention", "mamba"],
    "num_hidden_layers": 3,
    "intermediate_size": 12,
    "shared_intermediate_size": 20,
    "mamba_n_heads": 8,
    "mamba_d_head": 4,
    "mamba_d_state": 8,
}
_ZAMBA = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "n_mamba_heads": 8,
    "mamba_headdim": 4,
    "mamba_d_state": 8,
    "adapter_rank": 4,
}
_JAMBA = _HEADS | {
    "num_hidden_layers": 4,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "num_experts": 4,
    "intermediate_size": 24,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "state-spaces/mamba-130m-hf": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "state_size": 8,
        "time_step_rank": 4,
    },
    "tiiuae/falcon-mamba-7b": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "state_size": 8,
        "time_step_rank": 4,
    },
    "mistralai/Mamba-Codestral-7B-v0.1": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 16,
        "head_dim": 2,
        "num_hidden_layers": 3,
        "state_size": 8,
    },
    "nvidia/Nemotron-H-8B-Base-8K": {k: v for k, v in _NEMOTRON.items() if k != "head_dim"},
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": _NEMOTRON,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": _NEMOTRON
    | {
        "hybrid_override_pattern": "MEM*ME",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
    },
    "ibm-granite/granite-4.0-h-350m": _GRANITE,
    "ibm-granite/granite-4.0-h-tiny": _GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "tiiuae/Falcon-H1-0.5B-Base": _HEADS
    | {
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "head_dim": 4,
        "mamba_d_ssm": 24,
        "mamba_n_heads": 6,
        "mamba_d_head": 4,
        "mamba_d_state": 8,
    },
    "ibm-ai-platform/Bamba-9B": _HEADS
    | {
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "intermediate_size": 24,
        "mamba_n_heads": 8,
        "mamba_d_head": 4,
        "mamba_d_state": 8,
    },
    "Zyphra/Zamba2-1.2B": _ZAMBA,
    "Zyphra/Zamba2-2.7B": _ZAMBA,
    "ai21labs/Jamba-v0.1": _JAMBA,
    "ai21labs/AI21-Jamba-1.5-Mini": _JAMBA | {"eos_token_id": [2, 18]},
    "ai21labs/AI21-Jamba2-3B": _JAMBA | {"num_experts": 1, "num_key_value_heads": 1},
}
"""What a small checkpoint of the same form has instead, beside the vocabulary."""


def small_fields(name: str, **overrides: Any) -> dict[str, Any]:
    """The published fields with small sizes; a field that is to be None is left out."""
    gone = {field for field, value in overrides.items() if value is None}
    fields = {**PUBLISHED[name], **_IDS, **SMALL[name], **overrides}
    return {field: value for field, value in fields.items() if field not in gone}


def write_published(folder: Path, name: str, **overrides: Any) -> None:
    """A small checkpoint of the form of a published one: random weights in bfloat16, in two shards."""
    fields = small_fields(name, **overrides)
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(json.loads(json.dumps(fields)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model = lively(model) if fields["model_type"] in PURE else louder(model)
    held = sum(2 * weight.numel() for weight in model.parameters())
    model.bfloat16().save_pretrained(folder, max_shard_size=held * 3 // 5)
    pico_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    for named in {value.partition(".")[0] for value in fields.get("auto_map", {}).values()}:
        (folder / f"{named}.py").write_text("raise SystemExit('foreign code was run')\n")
