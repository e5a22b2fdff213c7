"""The fields of foreign JSON files: only those that are known here reach a library, and only sane values.

A library takes some fields for commands: transformers fetches and imports the kernel that
`_attn_implementation` names, and opens the file that a tokenizer's `vocab_file` names. So nothing is handed
over as it came.
`reading.py` and `tokenizing.py` ask here before they build anything; the files themselves go out unchanged.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import transformers

from ..data.foreign import first_line, short
from .files import few

LAYERS = 4096
"""Most layers, and most entries of a list: more cannot be meant, and would take time to refuse."""
SIZE = 1 << 24
"""Largest size, in units of whatever it counts."""
_LONG = 2**31 - 1  # of what only numbers tokens
_TEXT = 4096  # characters of a string

# What stock code has beside the fields of a configuration class, and reads where a file has it.
_ALSO = {
    "head_dim",
    "intermediate_size",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "layer_types",
    "layers_block_type",
}
_OLDER = {
    "nemotron_h": "hybrid_override_pattern mtp_hybrid_override_pattern num_hidden_layers mamba_n_groups "
    "mamba_d_conv mamba_expand mamba_dt_min mamba_dt_max mamba_dt_limit mamba_dt_init_floor mamba_conv_bias "
    "mamba_chunk_size",
    "zamba2": "num_hidden_layers",
    "qwen3_next": "full_attention_interval",
    "qwen3_5_text": "full_attention_interval",
    "qwen3_5_moe_text": "full_attention_interval",
    "kimi_linear": "first_k_dense_replace linear_attn_config",
}
"""Names that the class takes under its **kwargs."""
# What names an implementation or the form of an output, and what says nothing of a causal language model.
_LEFT_OUT = set(
    "self kwargs model_type transformers_version architectures dtype torch_dtype auto_map "
    "output_hidden_states output_attentions return_dict is_encoder_decoder chunk_size_feed_forward "
    "id2label label2id num_labels problem_type use_mamba_kernels use_mambapy use_falcon_mambapy "
    "use_associative_scan use_mem_eff_path attn_implementation experts_implementation per_layer_config "
    "quantization_config".split()
)
_ROPE = set(
    "rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow "
    "short_factor long_factor low_freq_factor high_freq_factor partial_rotary_factor mscale mscale_all_dim "
    "truncate mrope_section mrope_interleaved".split()
)
_LINEAR = set("full_attn_layers kda_layers head_dim num_heads short_conv_kernel_size".split())
_IN_OBJECTS = ("rope_parameters", "rope_scaling")
_POSITIONS = ("vocab_size", "max_position_embeddings", "original_max_position_embeddings", "sliding_window")
_ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
_IMPLEMENTATIONS = (
    *_ATTENTION,
    *("_experts_implementation", "experts_implementation", "_experts_implementation_internal"),
)
_HERE = ("eager", "sdpa")  # implementations that every machine has


def config_fields(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` that its stock configuration class is given.

    Args:
        kind: the model type, one that transformers has.

    Raises:
        ValueError: a field that would change the model in a way that is not supported, or whose value no
            model can have; names it, and what is allowed.
    """
    if fields.get("per_layer_config"):
        raise ValueError("per_layer_config is not supported; all layers must share one configuration")
    if kind == "kimi_linear" and fields.get("mla_use_nope") is False:
        raise ValueError(
            "mla_use_nope is false; allowed: true, as transformers' latent attention has no positions"
        )
    known, whole = _known(kind)
    kept: dict[str, Any] = {}
    for name in fields.keys() & known:
        value = fields[name]
        if name in _IN_OBJECTS:
            kept[name] = _rope(name, value)
            continue
        if name == "linear_attn_config" and isinstance(value, dict):  # KimiLinear's older form
            kept[name] = {key: inner for key, inner in value.items() if key in _LINEAR}
            for key, inner in kept[name].items():
                _refuse_absurd(f"{name}.{key}", inner)
            continue
        if name in whole and isinstance(value, bool):
            raise ValueError(f"{name} is {short(value)}; allowed: a whole number")
        _refuse_absurd(name, value)
        kept[name] = value
    for name in _ATTENTION:
        if fields.get(name) in _HERE:
            kept["attn_implementation"] = fields[name]
    return {name: kept[name] for name in (*fields, "attn_implementation") if name in kept}


def config_notes(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What the user of a model should know of the fields of its `config.json` that are not followed here."""
    notes = []
    asked = {name: value for name in _IMPLEMENTATIONS if (value := fields.get(name)) not in (None, *_HERE)}
    for name, value in asked.items():
        what = "experts" if "experts" in name else "attention"
        notes.append(
            f"config.json asks for {name} {short(value)}, which is not used here: transformers' own code "
            f"computes {what}"
        )
    if fields.get("auto_map"):
        notes.append(
            "config.json names its own code (auto_map); it is not run: transformers' own model is used"
        )
    return tuple(notes)


def optional(stock: Any, name: str, default: Any = None) -> Any:
    """What a stock object (configuration, tokenizer, module) has in some classes and releases only.

    The one place that asks somebody else's objects by name; ours declare what they have.
    """
    return getattr(stock, name, default)


@lru_cache(16)
def _known(kind: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the fields of a model type, and of those that are whole numbers."""
    stock = transformers.CONFIG_MAPPING[kind]
    held = vars(stock())
    parameters = inspect.signature(stock.__init__).parameters
    held = {name: value for name, value in held.items() if name not in vars(transformers.PretrainedConfig())}
    older = {*_OLDER.get(kind, "").split()}  # which the class takes, though some are properties of it
    names = {*parameters, *held, *stock.attribute_map, *_ALSO, *older}
    properties = {n for n in names if isinstance(p := optional(stock, n), property) and p.fset is None}
    derived = properties - older
    known = {name for name in names - _LEFT_OUT - derived if not name.startswith("_")}
    whole = {name for name in known if type(held.get(name)) is int}
    return frozenset(known), frozenset(whole)


def _rope(name: str, value: Any) -> Any:
    """The rotary embedding's own fields, which older files have for each kind of layer."""
    if not isinstance(value, dict):
        _refuse_absurd(name, value)
        return value
    kept = {}
    for key, inner in value.items():
        if key in _ROPE:
            _refuse_absurd(f"{name}.{key}", inner)
            kept[key] = inner
        elif isinstance(inner, dict) and key.endswith("attention"):
            kept[key] = _rope(f"{name}.{key}", {k: v for k, v in inner.items() if k in _ROPE})
    return kept


def _refuse_absurd(name: str, value: Any) -> None:
    """Refuse what no model has, before memory or time is spent on it."""
    last = name.rpartition(".")[2]
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        if last == "rope_theta":  # a base, no size; JSON does not tell 1e11 from 100000000000
            return _refuse_absurd(name, float(value) if value.bit_length() < 1000 else math.inf)
        token = last.endswith("_token_id") or last == "num_logits_to_keep"
        least, most = (-_LONG if token else 0), (_LONG if token or last in _POSITIONS else SIZE)
        if last in ("num_hidden_layers", "num_mem_blocks"):
            most = LAYERS
        if not least <= value <= most:
            raise ValueError(f"{name} is {short(value)}; allowed: a whole number from {least} to {most}")
    if isinstance(value, int | float):
        if last.startswith("partial_rotary") and not 0 <= value <= 1:
            raise ValueError(f"{name} is {short(value)}; allowed: a number from 0 to 1")
        if not math.isfinite(value) and not last.endswith("limit"):
            raise ValueError(f"{name} is {short(value)}; allowed: a finite number")
    elif isinstance(value, str):
        if len(value) > _TEXT:
            raise ValueError(f"{name} has {len(value)} characters; allowed: {_TEXT}")
    elif isinstance(value, list | tuple):
        if len(value) > LAYERS:
            raise ValueError(f"{name} has {len(value)} entries; allowed: {LAYERS}")
        for inner in value:
            if isinstance(inner, list | tuple | dict):
                raise ValueError(f"{name} is {short(value)}; allowed: a list of numbers or of names")
            _refuse_absurd(name, inner)
    else:
        raise ValueError(f"{name} is {short(value)}; allowed: a number, a name or a list of them")


# ---------------------------------------------------------------------------------------- generation

_NUMBERS = set(
    "max_length max_new_tokens min_length min_new_tokens num_beams temperature top_k top_p min_p top_h "
    "typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size "
    "num_return_sequences".split()
)
_SWITCHES = {"do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"}
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens"}
_GENERATION = _NUMBERS | _SWITCHES | _IDS
# What a file says of itself, and what is a setting of other models or of speed: nothing is lost without it.
_UNSAID = {"transformers_version", "_from_model_config", "_commit_hash", "output_attentions"}
_UNSAID |= {"output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}


def generation_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a `generation_config.json` that are followed, and what to say of the others."""
    kept, wrong, unknown = {}, [], []
    for name, value in fields.items():
        if value is None or name in _UNSAID:
            continue
        if name not in _GENERATION:
            unknown.append(name)
        elif _sane(name, value):
            kept[name] = value
        else:
            wrong.append(f"{short(name)[1:-1]} {short(value)}")
    notes = []
    if wrong:
        notes.append(f"generation_config.json: ignored impossible values: {few(wrong)}")
    if unknown:
        notes.append(f"generation_config.json: ignored fields: {few([short(n)[1:-1] for n in unknown])}")
    return kept, tuple(notes)


def generation_config(fields: Mapping[str, Any]) -> tuple[transformers.GenerationConfig, tuple[str, ...]]:
    """The stock generation config of what a `generation_config.json` says, and what is not followed of it."""
    kept, notes = generation_fields(fields)
    try:
        return transformers.GenerationConfig.from_dict(dict(kept)), notes
    except Exception as error:  # fields that contradict each other: each release has its own rules
        ids = {name: value for name, value in kept.items() if name in _IDS}
        told = f"generation_config.json: only its token ids are followed ({first_line(error)})"
        return transformers.GenerationConfig.from_dict(ids), (*notes, told)


def _sane(name: str, value: Any) -> bool:
    if name in _SWITCHES:
        return isinstance(value, bool)
    if name in _NUMBERS:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _LONG
    if isinstance(value, list) is name.endswith("_id") and name != "eos_token_id":
        return False
    some = value if isinstance(value, list) and 0 < len(value) <= 65536 else [value]
    return all(type(token) is int and abs(token) <= _LONG for token in some)
