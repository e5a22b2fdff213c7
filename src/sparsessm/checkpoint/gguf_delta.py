"""Models of the gated delta rule in GGUF: Qwen3.5 and Qwen3-Next, their language models alone.

Beside `gguf_hybrids.py`, for `exporting.py`. Names, shapes, values and metadata are those that llama.cpp's
converter gives them; `bench/gguf_logits.py` compares what llama.cpp computes with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .gguf_part import FLOATS, Part, describe_attention

NAMES = {  # model type -> architecture in GGUF
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_next": "qwen3next",
}
_SECTIONS = [11, 11, 10]  # of the turning entries: time, height and width; of text all three are the same


def architecture(config: Any) -> str:
    """The name of the model's architecture in GGUF."""
    return NAMES[config.model_type]


def misfits(config: Any, names: Iterator[str]) -> Iterator[str]:
    """What llama.cpp has no place for, as "has ...".

    Args:
        names: of the model's tensors.
    """
    found = next((name for name in names if name.endswith("bias") and not name.endswith(".dt_bias")), None)
    if found is not None:
        yield f"has a bias {found}, for which llama.cpp has no place"
    if config.hidden_act not in ("silu", "swish"):
        yield f"has the activation {config.hidden_act!r}; llama.cpp has silu"
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    if keys != values:
        yield f"has heads of {keys} keys and {values} values; llama.cpp runs those with as many of both"
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        yield f"has positions of the kind {kind!r}, not exported yet"
    if config.model_type == "qwen3_next" and not (
        config.num_experts and not config.mlp_only_layers and config.decoder_sparse_step == 1
    ):
        yield "has layers without experts (mlp_only_layers, decoder_sparse_step), not exported yet"


def notes(config: Any) -> Iterator[str]:
    """What is otherwise in the file."""
    if _interval(config) is None:
        yield (
            "its layers of attention do not come at equal distances: llama.cpp before the key "
            "attention.recurrent_layers takes every fourth layer for one"
        )


def parts(config: Any, source: str, shape: tuple[int, ...], named: Any) -> Iterator[Part]:
    """What the file has of a stock tensor, as `gguf_hybrids.parts`."""
    for name, new, take in _made(config, source, shape, named):
        outer = name.startswith(("token_embd", "output."))
        yield Part(name, new, take, not FLOATS.fullmatch(name), outer)


def _made(
    config: Any, source: str, shape: tuple[int, ...], named: Any
) -> Iterator[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]]:
    """Name, shape and values of each part."""
    layer, kind = source.rpartition(".linear_attn.")[::2]
    if source.endswith("experts.gate_up_proj"):
        half = (shape[0], shape[1] // 2, shape[2])
        for place, which in enumerate(("gate", "up")):
            name = named.get_name(source.replace("gate_up", which))
            yield f"{name}.weight", half, partial(_half, place=place)
    elif (
        kind == "in_proj_qkvz.weight"
    ):  # of each key head its query, key, values and gates, one after another
        rows = torch.arange(shape[0]).view(config.linear_num_key_heads, -1)
        keys = config.linear_key_head_dim
        each = (rows.shape[1] - 2 * keys) // 2
        query, key, value, gate = (part.flatten() for part in rows.split([keys, keys, each, each], 1))
        both = {"qkv": torch.cat([query, key, value]), "z": gate}
        for which, order in both.items():
            name = named.get_name(f"{layer}.linear_attn.in_proj_{which}.weight", try_suffixes=(".weight",))
            yield name, (len(order), shape[1]), partial(_rows, order=order)
    elif source.endswith("experts.down_proj"):
        yield f"{named.get_name(source)}.weight", shape, _same
    elif name := named.get_name(
        source.replace(".dt_bias", ".dt_proj.bias"), try_suffixes=(".weight", ".bias")
    ):
        if kind == "conv1d.weight":
            shape = (shape[0], shape[-1])
        elif source.endswith("shared_expert_gate.weight"):
            shape = shape[1:]
        yield name, shape, _taken(config, source, kind)


def _taken(config: Any, source: str, kind: str) -> Callable[[Tensor], Tensor]:
    """What is done to a tensor's values.

    A stock norm holds what is added to one, llama.cpp's the sum. Where several value heads share a key head,
    transformers has them one after another, and llama.cpp repeats the key heads as a whole: the first value
    head of each, then the second of each.
    """
    if source.endswith("norm.weight") and kind != "norm.weight":
        return _plus_one
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if config.model_type == "qwen3_next" or keys == values or not kind:
        return _same
    width = config.linear_value_head_dim
    if kind in ("in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"):
        return partial(_rows, order=_turned(keys, values, 1))
    order = _turned(keys, values, width)
    if kind in ("in_proj_qkv.weight", "conv1d.weight"):
        before = torch.arange(2 * keys * config.linear_key_head_dim)
        return partial(_rows, order=torch.cat([before, len(before) + order]))
    if kind == "in_proj_z.weight":
        return partial(_rows, order=order)
    return partial(_columns, order=order) if kind == "out_proj.weight" else _same


def _turned(keys: int, values: int, width: int) -> Tensor:
    """The places of the value heads' entries, the first of every key head first."""
    return torch.arange(values * width).view(keys, values // keys, width).transpose(0, 1).flatten()


def _same(whole: Tensor) -> Tensor:
    return whole


def _plus_one(whole: Tensor) -> Tensor:
    return whole + 1


def _half(whole: Tensor, place: int) -> Tensor:
    return whole.chunk(2, 1)[place]


def _rows(whole: Tensor, order: Tensor) -> Tensor:
    return whole[order]


def _columns(whole: Tensor, order: Tensor) -> Tensor:
    return whole[:, order]


def describe(writer: Any, config: Any) -> None:
    """The metadata that llama.cpp's code for the model asks for, beside name and type of the file."""
    describe_attention(writer, config, config.num_key_value_heads, config.head_dim, config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 0.25)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type != "qwen3_next":
        writer.add_rope_dimension_sections([*(rope.get("mrope_section") or _SECTIONS), 0])
    if config.model_type == "qwen3_5_text":
        writer.add_feed_forward_length(config.intermediate_size)
    else:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    kinds = [kind == "linear_attention" for kind in config.layer_types]
    writer.add_array(f"{NAMES[config.model_type]}.attention.recurrent_layers", kinds)
    if interval := _interval(config):  # what older versions read
        writer.add_full_attention_interval(interval)


def _interval(config: Any) -> int | None:
    """The distance of layers of attention; None where they have not one."""
    kinds = [kind == "full_attention" for kind in config.layer_types]
    interval = kinds.index(True) + 1 if any(kinds) else len(kinds) + 1
    return interval if kinds == [(i + 1) % interval == 0 for i in range(len(kinds))] else None
