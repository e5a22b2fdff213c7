"""The original state-spaces checkpoint format, said in the words of transformers.

The authors of Mamba (state-spaces/mamba, `mamba_ssm/models/config_mamba.py` and `mixer_seq_simple.py`) store
a model as a `config.json` of their own fields and one `pytorch_model.bin`; transformers stores the same
weights under other names. This file is the dictionary between the two and touches no disk: `reading.py` and
`writing.py` ask it.
"""

from __future__ import annotations

import math
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
_SSM_FIELDS = {
    "Mamba1": (
        "layer d_state d_conv expand dt_rank bias conv_bias "
        "dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path"
    ).split(),
    "Mamba2": (
        "layer d_state d_conv expand headdim d_ssm ngroups D_has_hdim rmsnorm norm_before_gate dt_limit bias "
        "conv_bias chunk_size conv_init A_init_range dt_min dt_max dt_init_floor use_mem_eff_path"
    ).split(),
}
"""Fields of `ssm_cfg`, by its `layer`; `settings` passes over those that only matter to training or speed."""

_SAME = {"state_size": "d_state", "time_step_rank": "dt_rank", "head_dim": "headdim", "n_groups": "ngroups"}
"""Fields of transformers that `ssm_cfg` has under another name, of those that pruning may change."""


def is_original(config: Mapping[str, Any]) -> bool:
    """True for the fields of a state-spaces `config.json`, which has no `model_type`."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def to_transformers(name: str) -> str:
    """Name of a tensor in transformers, from its name in `pytorch_model.bin`."""
    return _EMBEDDING["transformers"] if name == _EMBEDDING["original"] else name


def to_original(name: str) -> str:
    """Name of a tensor in `pytorch_model.bin`, from its name in transformers."""
    return _EMBEDDING["original"] if name == _EMBEDDING["transformers"] else name


def model_type(config: Mapping[str, Any]) -> str:
    """transformers' name for the model of a state-spaces `config.json`; `settings` says if it is none."""
    ssm = config.get("ssm_cfg")
    return "mamba2" if isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2" else "mamba"


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `transformers.MambaConfig` or `Mamba2Config` for those of a state-spaces `config.json`.

    Absent fields take the defaults of the original `MambaConfig`, `Mamba` and `Mamba2`; the vocabulary is
    padded up to `pad_vocab_size_multiple` rows, as the original model pads its embedding.

    Raises:
        ValueError: a field that is unknown, malformed, or describes a model that transformers does not have
            (attention or MLP layers, LayerNorm instead of RMSNorm, Mamba-3 layers).
    """
    ssm = config.get("ssm_cfg") or {}
    if not isinstance(ssm, Mapping):
        raise ValueError(f"ssm_cfg must be an object, got {ssm!r}")
    layer = ssm.get("layer", "Mamba1")
    if not isinstance(layer, str) or layer not in _SSM_FIELDS:
        known = ", ".join(_SSM_FIELDS)
        raise ValueError(f"ssm_cfg.layer is {layer!r}; supported in this format: {known}")
    for key, value, plain in (
        ("attn_layer_idx", config.get("attn_layer_idx"), "no attention layers"),
        ("d_intermediate", config.get("d_intermediate"), "no MLP layers"),
    ):
        if value:
            raise ValueError(f"{key} is {value!r}; only models with {plain} are supported in this format")
    if not _flag(config, "rms_norm", True):
        raise ValueError("rms_norm is false; only models with RMSNorm are supported (as in transformers)")
    _refuse_unknown(config, _FIELDS, "")
    _refuse_unknown(ssm, _SSM_FIELDS[layer], "ssm_cfg.")

    vocabulary = _count(config, "vocab_size", 50277)
    multiple = _count(config, "pad_vocab_size_multiple", 8)
    width = _count(config, "d_model")
    common = {
        "vocab_size": -(-vocabulary // multiple) * multiple,
        "hidden_size": width,
        "num_hidden_layers": _count(config, "n_layer"),
        "conv_kernel": _count(ssm, "d_conv", 4, "ssm_cfg."),
        "use_bias": _flag(ssm, "bias", False, "ssm_cfg."),
        "use_conv_bias": _flag(ssm, "conv_bias", True, "ssm_cfg."),
        "residual_in_fp32": _flag(config, "residual_in_fp32", True),
        "tie_word_embeddings": _flag(config, "tie_embeddings", True),
        "layer_norm_epsilon": 1e-5,
    }
    return common | (_mamba1(ssm, width) if layer == "Mamba1" else _mamba2(ssm, width))


def _mamba1(ssm: Mapping[str, Any], width: int) -> dict[str, Any]:
    rank = ssm.get("dt_rank", "auto")
    return {
        "state_size": _count(ssm, "d_state", 16, "ssm_cfg."),
        "time_step_rank": "auto" if rank == "auto" else _count(ssm, "dt_rank", prefix="ssm_cfg."),
        **_channels(ssm, width),
        "architectures": ["MambaForCausalLM"],
    }


def _channels(ssm: Mapping[str, Any], width: int) -> dict[str, int]:
    """The channels of Mamba-1, int(expand * d_model) to its authors, who take any `expand`."""
    expand = ssm.get("expand", 2)
    if not isinstance(expand, float):
        return {"expand": _count(ssm, "expand", 2, "ssm_cfg.")}
    channels = int(expand * width) if math.isfinite(expand * width) else 0
    if channels < 1:
        raise ValueError(f"ssm_cfg.expand must give at least one channel, got {expand!r}")
    return {"intermediate_size": channels}  # transformers wants a whole `expand`, and takes this instead


def _mamba2(ssm: Mapping[str, Any], width: int) -> dict[str, Any]:
    expand = _count(ssm, "expand", 2, "ssm_cfg.")  # whole: the authors' Mamba2 fails with any other
    inner = expand * width
    for key, stock, plain in (
        ("D_has_hdim", False, "one D for each head are"),
        ("rmsnorm", True, "a norm behind the scan are"),
        ("norm_before_gate", False, "the gate before the norm are"),
    ):
        if _flag(ssm, key, stock, "ssm_cfg.") != stock:
            told, only = str(not stock).lower(), f"only models with {plain} supported (as in transformers)"
            raise ValueError(f"ssm_cfg.{key} is {told}; {only}")
    if (scanned := ssm.get("d_ssm")) not in (None, inner):
        raise ValueError(
            f"ssm_cfg.d_ssm is {scanned!r}; only models that scan all {inner} channels are supported"
        )
    size = _count(ssm, "headdim", 64, "ssm_cfg.")
    groups = _count(ssm, "ngroups", 1, "ssm_cfg.")
    if inner % size or inner // size % groups:
        raise ValueError(
            f"ssm_cfg: {inner} channels (expand * d_model) do not divide into heads of headdim {size} in "
            f"{groups} groups"
        )
    return {
        "state_size": _count(ssm, "d_state", 128, "ssm_cfg."),
        "expand": expand,
        "num_heads": inner // size,
        "head_dim": size,
        "n_groups": groups,
        "chunk_size": _count(ssm, "chunk_size", 256, "ssm_cfg."),
        "time_step_limit": _limits(ssm),
        # All one, <|endoftext|>, in the vocabulary of these models; transformers would say others.
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "architectures": ["Mamba2ForCausalLM"],
    }


def _limits(ssm: Mapping[str, Any]) -> list[float]:
    told = ssm.get("dt_limit", [0.0, math.inf])
    if isinstance(told, list) and len(told) == 2 and all(type(value) in (int, float) for value in told):
        low, high = told
        if 0 <= low < high:
            return [float(low), float(high)]
    raise ValueError(f"ssm_cfg.dt_limit must be two numbers, the lower one first, got {told!r}")


def updated(
    config: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The state-spaces `config.json` of a model whose shapes have changed; None if they have not.

    Args:
        config: as it came.
        before: what it says in the fields of transformers. now: these fields of the model today.
    """
    fields = dict(config)
    ssm = dict(config.get("ssm_cfg") or {})
    if now["num_hidden_layers"] != before["num_hidden_layers"]:
        fields["n_layer"] = now["num_hidden_layers"]
    ssm |= {ours: now[name] for name, ours in _SAME.items() if name in now and now[name] != before[name]}
    if (channels := _inner(now)) != _inner(before):
        ssm["expand"] = expansion(channels, now["hidden_size"])
        if ssm.get("d_ssm") is not None:
            ssm["d_ssm"] = channels
    if ssm != (config.get("ssm_cfg") or {}):
        fields["ssm_cfg"] = ssm
    return fields if fields != config else None


def _inner(fields: Mapping[str, Any]) -> int:
    """Channels of all heads."""
    return fields["num_heads"] * fields["head_dim"] if "num_heads" in fields else fields["intermediate_size"]


def expansion(channels: int, width: int) -> int | float:
    """An `expand` with int(expand * width) == channels, which is how the authors' Mamba takes it."""
    if channels % width == 0:
        return channels // width
    expand = channels / width
    # Rounded down, the product may stay below; one step up it cannot.
    return expand if int(expand * width) == channels else math.nextafter(expand, math.inf)


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
