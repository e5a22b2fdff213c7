"""The hybrids in GGUF: what `exporting.py` writes of models with attention beside their Mamba layers.

Names, shapes, values and metadata are those that llama.cpp's converter gives them and its code for the models
reads; `bench/gguf_logits.py` compares what it then computes with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .gguf_part import FLOATS, Part, describe_attention
from .known_fields import optional

NAMES = {  # model type -> architecture in GGUF; NemotronH with experts has one of its own
    "bamba": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "granitemoehybrid": "granitehybrid",
    "jamba": "jamba",
    "nemotron_h": "nemotron_h",
}
GRANITES = tuple(kind for kind, name in NAMES.items() if name == "granitehybrid")
_MIXER = {  # what NemotronH calls all alike, whatever the layer is
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
    **{f"{one}_proj.weight": f"attn_{one}.weight" for one in "qkv"},
    "o_proj.weight": "attn_output.weight",
    "up_proj.weight": "ffn_up.weight",
    "down_proj.weight": "ffn_down.weight",
    "gate.weight": "ffn_gate_inp.weight",
    "gate.e_score_correction_bias": "exp_probs_b.bias",
    "shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_OTHERS = {  # endings of names that gguf's own table lacks
    "experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "experts.up_proj": ("ffn_up_exps.weight",),
    "experts.down_proj": ("ffn_down_exps.weight",),
    "router.weight": ("ffn_gate_inp.weight",),
}


def architecture(config: Any) -> str:
    """The name of the model's architecture in GGUF."""
    return "nemotron_h_moe" if "moe" in _kinds(config) else NAMES[config.model_type]


def _kinds(config: Any) -> list[str]:
    """What each layer is: "linear_attention", "full_attention", "mlp" or "moe"; empty for FalconH1, whose
    layers are all both of the first two."""
    if config.model_type == "jamba":
        first, period = config.attn_layer_offset, config.attn_layer_period
        places = range(config.num_hidden_layers)
        return [
            "full_attention" if at >= first and (at - first) % period == 0 else "linear_attention"
            for at in places
        ]
    if config.model_type == "falcon_h1":
        return []
    return list(config.layers_block_type if config.model_type == "nemotron_h" else config.layer_types)


def misfits(config: Any, names: Iterator[str]) -> Iterator[str]:
    """What llama.cpp has no place for, as "has ...".

    Args:
        names: of the model's tensors.
    """
    kind = config.model_type
    acts = ("relu2",) if kind == "nemotron_h" else ("silu", "swish")
    act = config.mlp_hidden_act if kind == "nemotron_h" else config.hidden_act
    if act not in acts:
        yield f"has the activation {act!r}; llama.cpp has {acts[0]}"
    biases = re.compile(r".*(conv1d\.bias|dt_bias|dt_proj\.bias|e_score_correction_bias)")
    found = next((name for name in names if name.endswith("bias") and not biases.fullmatch(name)), None)
    if found is not None:
        yield f"has a bias {found}, for which llama.cpp has no place"
    if kind != "jamba" and tuple(config.time_step_limit) != (0.0, float("inf")):
        low, high = config.time_step_limit
        yield f"limits its steps to {low} and {high}; llama.cpp has no limits"
    inner, states = _channels(config)
    if kind in ("jamba", *GRANITES) and inner != 2 * config.hidden_size:
        yield (
            f"has {inner} channels; llama.cpp runs a {kind} of this width only with {2 * config.hidden_size}"
        )
    if kind != "jamba" and inner % states:
        yield f"has {states} states, which do not divide its {inner} channels; llama.cpp (b9190) needs that"
    if kind == "falcon_h1" and config.mamba_rms_norm and config.mamba_norm_before_gate:
        yield "has norms before the gate (mamba_norm_before_gate); llama.cpp has them behind it"
    if kind == "nemotron_h" and {"mlp", "moe"} <= {*_kinds(config)}:
        yield "has layers of experts and plain ones; llama.cpp has only the one or the other"
    if kind == "nemotron_h" and (config.moe_latent_size or config.n_group != 1):
        yield "has experts in groups or behind a narrower layer (n_group, moe_latent_size), not exported yet"
    if (
        kind not in ("jamba", "nemotron_h")
        and config.rope_parameters.get("rope_type", "default") != "default"
    ):
        yield f"has positions of the kind {config.rope_parameters['rope_type']!r}, not exported yet"
    if (
        kind not in ("falcon_h1", "nemotron_h")
        and _head(config) * config.num_attention_heads != config.hidden_size
    ):
        yield f"has heads of attention of {_head(config)}, which are not the width together; not exported yet"


def notes(config: Any) -> Iterator[str]:
    """What is otherwise in the file."""
    if config.model_type == "falcon_h1":
        yield (
            "llama.cpp has no multipliers for a falcon_h1: they are multiplied into the weights, which are "
            "then no longer on a grid"
        )


def _channels(config: Any) -> tuple[int, int]:
    """Its channels, and states of each."""
    if config.model_type == "nemotron_h":
        return config.mamba_num_heads * config.mamba_head_dim, config.ssm_state_size
    if config.model_type == "jamba":
        return config.mamba_expand * config.hidden_size, config.mamba_d_state
    return config.mamba_n_heads * config.mamba_d_head, config.mamba_d_state


def _groups(config: Any) -> int:
    """Groups of heads, which share B and C."""
    return config.n_groups if config.model_type == "nemotron_h" else config.mamba_n_groups


def _head(config: Any) -> int:
    """Entries of a head of attention."""
    return optional(config, "head_dim") or config.hidden_size // config.num_attention_heads


def _rotated(config: Any) -> int:
    """Entries of a head that its position turns; 0: none."""
    if config.model_type in ("jamba", "nemotron_h"):
        return 0
    if config.model_type == "granitemoehybrid" and config.position_embedding_type != "rope":
        return 0
    return int(_head(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


def parts(config: Any, source: str, shape: tuple[int, ...], named: Any) -> Iterator[Part]:
    """What the file has of a stock tensor; none of a name that GGUF does not know.

    Args:
        named: gguf's table of names for this model.
    """
    factor = _factor(config, source)
    for place, name in enumerate(found := list(_names(config, source, named))):
        take: Callable[[Tensor], Tensor] = partial(_take, place=place, count=len(found), factor=factor)
        new = shape
        if len(found) == 2:  # gate and up are one
            axis = len(shape) - 2
            new = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
        elif source.endswith("conv1d.weight"):
            new = (shape[0], shape[-1])
        elif source.endswith((".A_log", ".D")) and config.model_type != "jamba":
            new = (*shape, 1)
        elif name.endswith("ssm_norm.weight"):
            new = (_groups(config), shape[0] // _groups(config))
        elif config.model_type in GRANITES and (match := re.search(r"([qk])_proj\.weight$", source)):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            take = partial(_in_pairs, heads=heads, rotated=_rotated(config))
        outer = name.startswith(("token_embd", "output."))
        yield Part(name, new, take, not FLOATS.fullmatch(name), outer)
    if config.model_type == "falcon_h1" and config.tie_word_embeddings and "embed_tokens" in source:
        scale = torch.tensor(config.lm_head_multiplier)  # the head reads other multiples of the same rows
        yield Part("output.weight", shape, partial(_take, place=0, count=1, factor=scale), True, True)


def _names(config: Any, source: str, named: Any) -> Iterator[str]:
    """In GGUF, of a stock tensor or of the parts that it is cut into."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", source)
    layer, rest = (f"blk.{match[1]}.", match[2]) if match else ("", source)
    if layer and rest.startswith("mixer.") and (name := _MIXER.get(rest.removeprefix("mixer."))):
        yield layer + name
        return
    for ending, names in _OTHERS.items():
        if layer and rest.endswith(ending):
            yield from (layer + name for name in names)
            return
    shared = "_shexp" if optional(config, "num_local_experts") else ""
    if rest == "shared_mlp.input_linear.weight":
        yield from (f"{layer}ffn_{one}{shared}.weight" for one in ("gate", "up"))
    elif rest == "shared_mlp.output_linear.weight":
        yield f"{layer}ffn_down{shared}.weight"
    else:
        name = source.replace(".dt_bias", ".dt_proj.bias")
        if config.model_type == "nemotron_h":
            name = name.replace("model.", "backbone.")
        if short := named.get_name(name, try_suffixes=(".weight", ".bias")):
            yield short


def _take(whole: Tensor, place: int, count: int, factor: Tensor | None) -> Tensor:
    """One of `count` parts that lie along the rows, times a factor for each row."""
    part = whole.chunk(count, dim=whole.ndim - 2)[place] if count > 1 else whole
    return part if factor is None else part * factor


def _in_pairs(whole: Tensor, heads: int, rotated: int) -> Tensor:
    """The rows of each head so that those which turn together are neighbours; in transformers they are half
    of what is turned apart."""
    if not rotated:
        return whole
    turned, rest = whole.unflatten(0, (heads, -1)).split([rotated, whole.shape[0] // heads - rotated], 1)
    turned = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([turned, rest], 1).flatten(0, 1)


def _factor(config: Any, source: str) -> Tensor | None:
    """What FalconH1 multiplies a tensor's outputs with, (out, 1) or (); None: nothing."""
    if config.model_type != "falcon_h1" or not source.endswith("weight"):
        return None
    gate, down = config.mlp_multipliers
    factors = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": config.key_multiplier * config.attention_in_multiplier,
        "q_proj": config.attention_in_multiplier,
        "v_proj": config.attention_in_multiplier,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    kind = source.split(".")[-2]
    if kind == "in_proj":  # gate, input, B, C and step size have one each
        inner, states = (
            config.mamba_n_heads * config.mamba_d_head,
            config.mamba_n_groups * config.mamba_d_state,
        )
        rows = torch.tensor([inner, inner, states, states, config.mamba_n_heads])
        return (
            config.ssm_in_multiplier * torch.tensor(config.ssm_multipliers).repeat_interleave(rows)[:, None]
        )
    return torch.tensor(factors[kind]) if kind in factors else None


def describe(writer: Any, config: Any) -> None:
    """The metadata that llama.cpp's code for the model asks for, beside name and type of the file."""
    kind, kinds = config.model_type, _kinds(config)
    keys = config.num_key_value_heads
    epsilon = config.layer_norm_epsilon if kind == "nemotron_h" else config.rms_norm_eps
    shared = [keys if one == "full_attention" else 0 for one in kinds] or keys
    describe_attention(writer, config, shared, _head(config), epsilon)
    if rotated := _rotated(config):
        writer.add_rope_dimension_count(rotated)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind in GRANITES:
        writer.add_rope_scaling_finetuned(bool(rotated))
    _describe_mlps(writer, config, kinds)
    if kind == "granitemoehybrid":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    _describe_mixers(writer, config)


def _describe_mlps(writer: Any, config: Any, kinds: list[str]) -> None:
    kind, width = config.model_type, config.intermediate_size
    if kind == "nemotron_h":
        widths = {"mlp": width, "moe": config.moe_intermediate_size}
        writer.add_feed_forward_length([widths.get(one, 0) for one in kinds])
        if "moe" in kinds:
            writer.add_expert_count(config.n_routed_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
            writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
            writer.add_expert_shared_count(config.n_shared_experts)
            writer.add_expert_weights_norm(config.norm_topk_prob)
            writer.add_expert_weights_scale(config.routed_scaling_factor)
            writer.add_expert_group_count(config.n_group)
        return
    count = optional(config, "num_experts" if kind == "jamba" else "num_local_experts") or 0
    if kind == "granitemoehybrid" and not count:
        width = config.shared_intermediate_size
    writer.add_feed_forward_length(width)
    if count > 1 or (kind == "granitemoehybrid" and count):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if kind == "granitemoehybrid":
            writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _describe_mixers(writer: Any, config: Any) -> None:
    inner, states = _channels(config)
    nemotron = config.model_type == "nemotron_h"
    writer.add_ssm_conv_kernel(config.conv_kernel if nemotron else config.mamba_d_conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(states)
    if config.model_type == "jamba":
        writer.add_ssm_time_step_rank(config.mamba_dt_rank)
        return
    writer.add_ssm_time_step_rank(config.mamba_num_heads if nemotron else config.mamba_n_heads)  # heads
    writer.add_ssm_group_count(_groups(config))
