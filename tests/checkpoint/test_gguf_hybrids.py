"""Hybrids as GGUF: every tensor and all metadata that llama.cpp reads, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import fields_of, stored
from gguf_hybrid_files import expected
from packable import stock
from pico_hybrids import pico_hybrid
from whereabouts import pruned

import sparsessm
from sparsessm.checkpoint import Exported, export

EXPERTS = {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}
PLAIN = {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("bamba", {}),
    "bamba, tied": ("bamba", {"tie_word_embeddings": True, "mamba_conv_bias": False}),
    "falcon_h1": ("falcon_h1", {}),
    "falcon_h1, tied": (
        "falcon_h1",
        {"tie_word_embeddings": True, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "granitemoehybrid, plain": ("granite-dense", {}),
    "granitemoehybrid, rope": ("granitemoehybrid", {"position_embedding_type": "rope"}),
    "jamba": ("jamba", {}),
    "jamba, plain": ("jamba", {"num_experts": 1, "mamba_conv_bias": False}),
    "nemotron_h": ("nemotron_h", PLAIN),
    "nemotron_h, experts": ("nemotron_h", EXPERTS),
}


def made(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Path, Any]:
    kind, fields = MODELS[name]
    model = pico_hybrid(kind, **fields, **more).to(dtype)
    return stock(folder, model), model


def typed(name: str, value: torch.Tensor) -> bool:
    """Whether it takes the type that is asked for, as matrices do, but not routers, scans, convolutions."""
    others = ("ssm_conv1d", "ssm_a", "ssm_d", "norm", "gate_inp")
    return value.ndim > 1 and (name.endswith("ssm_dt.weight") or not any(word in name for word in others))


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_what_the_converter_makes_of_it(name: str, tmp_path: Path) -> None:
    source, model = made(name, tmp_path / "m")
    whole = expected(model)
    for kind in ("f32", "bf16"):
        done = export(source, tmp_path / "m.gguf", type=kind, force=True)
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(done.file).tensors}
        assert read.keys() == whole.keys() == done.tensors.keys()
        for short, value in whole.items():
            assert read[short].shape.tolist() == list(value.shape)[::-1], short
            held = kind if typed(short, value) else "f32"
            wanted, content = stored(value, held)
            assert done.tensors[short] == (wanted, len(content)), short
            data = torch.from_numpy(gguf.quants.dequantize(read[short].data, read[short].tensor_type).copy())
            torch.testing.assert_close(
                data.view(value.shape), value, rtol=1e-6 if held == "f32" else 0.01, atol=0
            )


def test_experts_are_quantised_in_blocks(tmp_path: Path) -> None:
    source, model = made(
        "granitemoehybrid", tmp_path / "m", hidden_size=64, intermediate_size=96, shared_intermediate_size=64
    )
    done, whole = export(source, tmp_path / "m.gguf", type="q4_0"), expected(model)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(done.file).tensors}
    for short in ("ffn_gate_exps", "ffn_down_exps", "ffn_up_shexp", "attn_q", "ssm_in"):
        name = f"blk.{1 if short == 'attn_q' else 0}.{short}.weight"
        value = whole[name]
        content = gguf.quants.quantize(
            value.reshape(-1, value.shape[-1]).numpy(), gguf.GGMLQuantizationType.Q4_0
        )
        assert read[name].data.tobytes() == content.tobytes() and done.tensors[name][0] == "q4_0"
        assert read[name].shape.tolist() == list(value.shape)[::-1]
    assert done.tensors["blk.0.ffn_gate_inp.weight"][0] == "f32"


def test_what_was_pruned_to_blocks_is_in_the_file_to_the_bit(tmp_path: Path) -> None:
    source, _ = made("bamba", tmp_path / "m", torch.bfloat16, hidden_size=64, intermediate_size=96)
    came, report = pruned(source, None, grid="q4_0")
    sparsessm.save(came, tmp_path / "out", report)
    done, whole = export(tmp_path / "out", tmp_path / "m.gguf", type="q4_0"), expected(came.model)
    count = 0
    for tensor in gguf.GGUFReader(done.file).tensors:
        if tensor.tensor_type.name == "Q4_0":
            read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(read, whole[tensor.name].numpy()), tensor.name
            count += 1
    assert count == len(report.rows)


def fields(name: str, folder: Path) -> tuple[str, dict[str, Any], Exported]:
    done = export(made(name, folder / "m")[0], folder / "m.gguf")
    told = fields_of(done.file)
    kind = told["general.architecture"]
    return (
        kind,
        {key.removeprefix(f"{kind}."): value for key, value in told.items() if key.startswith(kind)},
        done,
    )


MIXER = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 32,
    "ssm.state_size": 8,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
}
HEADS = {"attention.head_count": 4, "attention.key_length": 4, "attention.value_length": 4}
SAID: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": (
        "granitehybrid",
        MIXER | HEADS | {
            "attention.head_count_kv": [0, 2, 0],
            "feed_forward_length": 24,
            "rope.scaling.finetuned": True,
            "rope.dimension_count": 2,
            "rope.freq_base": 10000.0,
        },
    ),
    "granitemoehybrid": (
        "granitehybrid",
        MIXER | HEADS | {
            "attention.head_count_kv": [0, 2, 0],
            "rope.scaling.finetuned": False,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_feed_forward_length": 20,
            "attention.scale": pytest.approx(0.4),
            "embedding_scale": 3.0,
            "residual_scale": pytest.approx(0.6),
            "logit_scale": 2.0,
        },
    ),
    "granitemoehybrid, plain": ("granitehybrid", {"feed_forward_length": 20}),
    "falcon_h1": (
        "falcon-h1",
        HEADS
        | {"ssm.inner_size": 24, "ssm.time_step_rank": 6}
        | {"attention.head_count_kv": 2, "rope.freq_base": 10000.0},
    ),
    "jamba": (
        "jamba",
        HEADS | {
            "attention.head_count_kv": [0, 2, 0, 0],
            "ssm.time_step_rank": 3,
            "ssm.inner_size": 32,
            "expert_count": 4,
            "expert_used_count": 2,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        HEADS
        | {"feed_forward_length": [0, 24, 0, 0], "attention.head_count_kv": [0, 0, 2, 0]}
        | {"ssm.inner_size": 24},
    ),
    "nemotron_h, experts": (
        "nemotron_h_moe",
        {
            "feed_forward_length": [0, 12, 0, 12],
            "expert_feed_forward_length": 12,
            "expert_shared_feed_forward_length": 20,
            "expert_weights_norm": True,
            "expert_group_count": 1,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_the_model(name: str, tmp_path: Path) -> None:
    kind, told, done = fields(name, tmp_path)
    wanted, said = SAID[name]
    assert kind == wanted and {key: told.get(key) for key in said} == said
    assert told["embedding_length"] == 16
    if isinstance(heads := told["attention.head_count_kv"], list):
        assert told["block_count"] == len(heads)
    assert any("multiplied into the weights" in note for note in done.notes) is (wanted == "falcon-h1")
    if "plain" in name:
        assert "expert_count" not in told
    if name in ("jamba", "nemotron_h"):
        assert not any(key.startswith("rope.") for key in told)


NORMS = {"mamba_rms_norm": True, "mamba_norm_before_gate": True}
TURNED = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "zamba2": (
        "zamba2",
        {},
        "is a zamba2 model; exported to GGUF are: mamba, falcon_mamba, mamba2, bamba, falcon_h1, ",
    ),
    "bias": (
        "bamba",
        {"attention_bias": True},
        r"has a bias model.layers.1.self_attn.q_proj.bias, for which",
    ),
    "activation": (
        "nemotron_h",
        {**PLAIN, "mlp_hidden_act": "silu"},
        "activation 'silu'; llama.cpp has relu2",
    ),
    "limits": ("bamba", {"time_step_limit": [0.1, 0.6]}, "limits its steps to 0.1 and 0.6; llama.cpp has no"),
    "channels": (
        "bamba",
        {"mamba_expand": 3, "mamba_n_heads": 6},
        "has 48 channels; llama.cpp runs a bamba of this width only with 32",
    ),
    "channels of a jamba": ("jamba", {"mamba_expand": 3}, "has 48 channels; llama.cpp runs a jamba of this"),
    "states": ("falcon_h1", {"mamba_d_state": 7}, "has 7 states, which do not divide its 24 channels"),
    "norms": ("falcon_h1", NORMS, "has norms before the gate"),
    "both": ("nemotron_h", {}, "has layers of experts and plain ones"),
    "latent": ("nemotron_h", {**EXPERTS, "moe_latent_size": 8}, "moe_latent_size"),
    "positions": ("falcon_h1", TURNED, "has positions of the kind 'linear', not exported yet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(name: str, tmp_path: Path) -> None:
    kind, changes, message = REFUSED[name]
    source = stock(tmp_path / "m", pico_hybrid(kind, **changes))
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "m.gguf", type="f32")
    assert not (tmp_path / "m.gguf").exists()
