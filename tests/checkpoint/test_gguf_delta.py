"""Models of the delta rule as GGUF, against llama.cpp's converter, transcribed head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import fields_of
from packable import stock
from pico import pico_tokenizer
from pico_hybrids import FAMILIES, pico_hybrid
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from sparsessm.checkpoint import export

SQUARE = {"linear_value_head_dim": 8, "num_hidden_layers": 4}  # as many values as keys
EVEN = SQUARE | {"layer_types": ["linear_attention", "full_attention"] * 2}
UNEVEN = SQUARE | {
    "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3_5_text", EVEN),
    "dense, tied": ("qwen3_5_text", UNEVEN | {"tie_word_embeddings": True}),
    "dense, three values a key": ("qwen3_5_text", EVEN | {"linear_num_value_heads": 6}),
    "dense, one value a key": ("qwen3_5_text", EVEN | {"linear_num_value_heads": 2}),
    "experts": ("qwen3_5_moe_text", UNEVEN),
    "next": ("qwen3_next", EVEN | {"mlp_only_layers": []}),
}
LINEAR = {
    "in_proj_qkv": "attn_qkv",
    "in_proj_z": "attn_gate",
    "in_proj_b": "ssm_beta",
    "in_proj_a": "ssm_alpha",
    "in_proj_ba": "ssm_ba",
    "out_proj": "ssm_out",
    "conv1d": "ssm_conv1d",
}
ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
FLOATS = (".ssm_a.", "norm", "ssm_conv1d", "ssm_dt", "gate_inp")


def made(name: str, folder: Path) -> tuple[Path, Any]:
    kind, fields = MODELS[name]
    model = pico_hybrid(kind, **fields)
    return stock(folder, model), model


def tiled(config: Any, blocks: list[Tensor]) -> list[Tensor]:
    """Blocks of value heads, the first of each key head first (Qwen3.5)."""
    keys, each = config.linear_num_key_heads, len(blocks) // config.linear_num_key_heads
    if config.model_type == "qwen3_next":
        return blocks
    return [blocks[key * each + which] for which in range(each) for key in range(keys)]


def linear(config: Any, rest: str, value: Tensor) -> dict[str, Tensor]:
    """Of a layer of the delta rule, without the layer's number."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    width, wide = config.linear_key_head_dim, config.linear_value_head_dim
    kind = rest.removesuffix(".weight")
    if kind == "norm":
        return {"ssm_norm.weight": value}
    if kind in ("A_log", "dt_bias"):
        value = -torch.exp(value) if kind == "A_log" else value
        one = torch.stack(tiled(config, list(value)))
        return {"ssm_a" if kind == "A_log" else "ssm_dt.bias": one}
    if kind == "in_proj_qkvz":
        parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "z": []}
        each, at = heads // keys * wide, 0
        for _ in range(keys):
            for name, count in (("q", width), ("k", width), ("v", each), ("z", each)):
                parts[name].append(value[at : at + count])
                at += count
        return {
            "attn_qkv.weight": torch.cat([*parts["q"], *parts["k"], *parts["v"]]),
            "attn_gate.weight": torch.cat(parts["z"]),
        }
    if kind == "conv1d":
        value = value[:, 0]
    if kind in ("in_proj_qkv", "conv1d"):
        before = 2 * keys * width
        value = torch.cat([value[:before], *tiled(config, list(value[before:].split(wide)))])
    elif kind == "in_proj_z":
        value = torch.cat(tiled(config, list(value.split(wide))))
    elif kind in ("in_proj_b", "in_proj_a"):
        value = torch.cat(tiled(config, list(value.split(1))))
    elif kind == "out_proj":
        value = torch.cat(tiled(config, list(value.split(wide, dim=1))), dim=1)
    return {f"{LINEAR[kind]}.weight": value}


def expected(model: Any) -> dict[str, Tensor]:
    """All tensors of the file."""
    found: dict[str, Tensor] = {}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in model.state_dict().items():
        if (short := outer.get(name.removesuffix(".weight"))) is not None:
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                found[f"{short}.weight"] = value + 1 if short == "output_norm" else value
            continue
        _, _, layer, part, *rest = name.split(".")
        ending = ".".join(rest)
        if part == "linear_attn":
            new = linear(model.config, ending, value)
        elif part == "input_layernorm":
            new = {"attn_norm.weight": value + 1}
        elif part == "post_attention_layernorm":
            new = {"post_attention_norm.weight": value + 1}
        elif part == "self_attn":
            if "norm" in ending:
                new = {f"attn_{ending}": value + 1}
            else:
                new = {f"{ATTENTION[ending[0]]}.weight": value}
        elif ending == "experts.gate_up_proj":
            gate, up = value.chunk(2, dim=1)
            new = {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
        elif ending == "experts.down_proj":
            new = {"ffn_down_exps.weight": value}
        elif ending == "gate.weight":
            new = {"ffn_gate_inp.weight": value}
        elif ending == "shared_expert_gate.weight":
            new = {"ffn_gate_inp_shexp.weight": value[0]}
        else:
            kind = "_shexp" if "shared_expert" in ending else ""
            new = {f"ffn_{ending.removeprefix('shared_expert.').split('_')[0]}{kind}.weight": value}
        found |= {f"blk.{layer}.{short}": tensor for short, tensor in new.items()}
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_what_the_converter_makes_of_it(name: str, tmp_path: Path) -> None:
    source, model = made(name, tmp_path / "m")
    whole = expected(model)
    for kind in ("f32", "bf16"):
        done = export(source, tmp_path / "m.gguf", type=kind, force=True)
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(done.file).tensors}
        assert read.keys() == whole.keys()
        for short, value in whole.items():
            assert read[short].shape.tolist() == list(value.shape)[::-1], short
            held = "f32" if any(word in f"{short}." for word in FLOATS) else kind
            assert done.tensors[short][0] == held, short
            data = torch.from_numpy(gguf.quants.dequantize(read[short].data, read[short].tensor_type).copy())
            torch.testing.assert_close(
                data.view(value.shape), value, rtol=1e-6 if held == "f32" else 0.01, atol=0
            )


COMMON = {
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "rope.dimension_count": 4,
    "rope.freq_base": 100.0,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 32,
    "ssm.state_size": 8,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}
ROUTED = {
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 12,
    "expert_shared_feed_forward_length": 20,
}
SAID: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (
        "qwen35",
        {"feed_forward_length": 24, "full_attention_interval": 2, "rope.dimension_sections": [1, 1, 0, 0]},
    ),
    "experts": ("qwen35moe", ROUTED | {"full_attention_interval": None}),
    "next": ("qwen3next", ROUTED | {"full_attention_interval": 2, "rope.dimension_sections": None}),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_the_model(name: str, tmp_path: Path) -> None:
    source, model = made(name, tmp_path / "m")
    done = export(source, tmp_path / "m.gguf")
    told = fields_of(done.file)
    kind, said = SAID[name]
    assert told["general.architecture"] == kind
    recurrent = [one == "linear_attention" for one in model.config.layer_types]
    for key, value in (COMMON | said | {"block_count": 4, "attention.recurrent_layers": recurrent}).items():
        assert told.get(f"{kind}.{key}") == value, key
    assert any("equal distances" in note for note in done.notes) is (name == "experts")


def test_of_a_model_with_pictures_the_language_model_is_written(tmp_path: Path) -> None:
    text = pico_hybrid("qwen3_5_text", **EVEN)
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = AutoConfig.for_model("qwen3_5", text_config=text.config.to_dict(), vision_config=vision)
    model: Any = AutoModelForImageTextToText.from_config(config)
    model.model.language_model.load_state_dict(text.model.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
    model.lm_head.load_state_dict(text.lm_head.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(tmp_path / "whole")
    pico_tokenizer().save_pretrained(tmp_path / "whole")
    done = export(tmp_path / "whole", tmp_path / "m.gguf", type="f32")
    alone = export(stock(tmp_path / "alone", text), tmp_path / "alone.gguf", type="f32")
    ours, wanted = (gguf.GGUFReader(one.file).tensors for one in (done, alone))
    assert [t.name for t in ours] and {t.name: t.data.tobytes() for t in ours} == {
        t.name: t.data.tobytes() for t in wanted
    }
    assert any("not in the file" in note and "model.visual" in note for note in done.notes)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "widths": ("qwen3_5_text", {}, "has heads of 8 keys and 5 values; llama.cpp runs those with as many"),
    "bias": (
        "qwen3_5_text",
        EVEN | {"attention_bias": True},
        "has a bias .*layers.1.self_attn.q_proj.bias",
    ),
    "activation": ("qwen3_5_text", EVEN | {"hidden_act": "gelu"}, "activation 'gelu'; llama.cpp has silu"),
    "mixed": ("qwen3_next", EVEN, r"has layers without experts \(mlp_only_layers"),
    "none": ("qwen3_next", EVEN | {"num_experts": 0, "mlp_only_layers": []}, "has layers without experts"),
    "other": ("kimi_linear", {}, "is a kimi_linear model; exported to GGUF are: .*qwen3_5_text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    kind, fields, message = REFUSED[name]
    assert kind in FAMILIES
    source = stock(tmp_path / "m", pico_hybrid(kind, **fields))
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
