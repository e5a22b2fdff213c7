"""The original state-spaces checkpoint format, said in the words of transformers.

The authors of Mamba (state-spaces/mamba, `mamba_ssm/models/config_mamba.py` and `mixer_seq_simple.py`) store
a model as a `config.json` of their own fields and one `pytorch_model.bin`; transformers stores the same
weights under other names. This file is the dictionary between the two and touches no disk: `reading.py` and
`writing.py` ask it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TOKENIZER = "EleutherAI/gpt-neox-20b"
"""The tokenizer of every published state-spaces checkpoint; their directories carry none."""

_EMBEDDING = {"original": "backbone.embedding.weight", "transformers": "backbone.embeddings.weight"}
"""The one tensor whose name differs."""

_FIELDS = (
    "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32 "
    "fused_add_norm pad_vocab_size_multiple tie_embeddings"
).split()
_SSM_FIELDS = (
    "layer d_state d_conv expand dt_rank bias conv_bias "  # these shape the model
    "dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path"  # these only matter to training and speed
).split()


def is_original(config: Mapping[str, Any]) -> bool:
    """True for the fields of a state-spaces `config.json`, which has no `model_type`."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def to_transformers(name: str) -> str:
    """Name of a tensor in transformers' `MambaForCausalLM`, from its name in `pytorch_model.bin`."""
    return _EMBEDDING["transformers"] if name == _EMBEDDING["original"] else name


def to_original(name: str) -> str:
    """Name of a tensor in `pytorch_model.bin`, from its name in transformers' `MambaForCausalLM`."""
    return _EMBEDDING["original"] if name == _EMBEDDING["transformers"] else name


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `transformers.MambaConfig` for the fields of a state-spaces `config.json`.

    Absent fields take the defaults of the original `MambaConfig`; the vocabulary is padded up to
    `pad_vocab_size_multiple` rows, as the original model pads its embedding.

    Raises:
        ValueError: a field that is unknown, malformed, or describes a model other than plain Mamba-1
            (Mamba-2 layers, attention or MLP layers, LayerNorm instead of RMSNorm).
    """
    ssm = config.get("ssm_cfg") or {}
    if not isinstance(ssm, Mapping):
        raise ValueError(f"ssm_cfg must be an object, got {ssm!r}")
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise ValueError(f"ssm_cfg.layer is {layer!r}; only 'Mamba1' is supported in this format")
    for key, value, plain in (
        ("attn_layer_idx", config.get("attn_layer_idx"), "no attention layers"),
        ("d_intermediate", config.get("d_intermediate"), "no MLP layers"),
    ):
        if value:
            raise ValueError(f"{key} is {value!r}; only models with {plain} are supported in this format")
    if not _flag(config, "rms_norm", True):
        raise ValueError("rms_norm is false; only models with RMSNorm are supported (as in transformers)")
    _refuse_unknown(config, _FIELDS, "")
    _refuse_unknown(ssm, _SSM_FIELDS, "ssm_cfg.")

    vocabulary = _count(config, "vocab_size", 50277)
    multiple = _count(config, "pad_vocab_size_multiple", 8)
    rank = ssm.get("dt_rank", "auto")
    return {
        "vocab_size": -(-vocabulary // multiple) * multiple,
        "hidden_size": _count(config, "d_model"),
        "num_hidden_layers": _count(config, "n_layer"),
        "state_size": _count(ssm, "d_state", 16, "ssm_cfg."),
        "conv_kernel": _count(ssm, "d_conv", 4, "ssm_cfg."),
        "expand": _count(ssm, "expand", 2, "ssm_cfg."),
        "time_step_rank": "auto" if rank == "auto" else _count(ssm, "dt_rank", prefix="ssm_cfg."),
        "use_bias": _flag(ssm, "bias", False, "ssm_cfg."),
        "use_conv_bias": _flag(ssm, "conv_bias", True, "ssm_cfg."),
        "residual_in_fp32": _flag(config, "residual_in_fp32", True),
        "tie_word_embeddings": _flag(config, "tie_embeddings", True),
        "layer_norm_epsilon": 1e-5,
        "architectures": ["MambaForCausalLM"],
    }


def _count(fields: Mapping[str, Any], key: str, default: int | None = None, prefix: str = "") -> int:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{prefix}{key} must be a whole number of at least 1, got {value!r}")
    return value


def _flag(fields: Mapping[str, Any], key: str, default: bool, prefix: str = "") -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{prefix}{key} must be true or false, got {value!r}")
    return value


def _refuse_unknown(fields: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in fields:
        if key not in known:
            raise ValueError(f"unknown field {prefix}{key}; known: {', '.join(known)}")
