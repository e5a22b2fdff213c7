"""The files that bench/hybrids.py measures: models of random weights, some periods of their layers.

A stock directory in bfloat16; packed ones of int8 (`sparsessm pack`) and of codes that take so many bits as
those of the dial; GGUF in BF16 (`sparsessm export`), and of that by llama-quantize its other types. The
shapes are the published ones as far as we know them; no published configuration could be looked at here.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peers_files import BESIDE, WORDS, once, quantise
from runtime import coded  # bench/runtime.py
from transformers import AutoConfig, AutoModelForCausalLM

from sparsessm import checkpoint
from sparsessm.checkpoint import packed, packed_file
from sparsessm.checkpoint.container import PACKED
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.stacked import stacked

LINEAR, FULL, MLP = "linear_attention", "full_attention", "mlp"
ALONE = " (recurrent layers alone)"
MOST = 3e9  # bytes of weights in bfloat16 of a model that is measured, if its two periods have no more
Shape = tuple[str, int, list[str], dict[str, Any]]
SHAPES: dict[str, Shape] = {  # model type, layers, a period, fields
    "qwen3.5-0.8b": (
        "qwen3_5_text",
        24,
        [LINEAR, LINEAR, LINEAR, FULL],
        {
            **{"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "head_dim": 256},
            **{"num_key_value_heads": 2, "linear_num_key_heads": 16, "linear_num_value_heads": 16},
            **{"vocab_size": 248320, "tie_word_embeddings": True},
        },
    ),
    "qwen3.5-2b": (
        "qwen3_5_text",
        24,
        [LINEAR, LINEAR, LINEAR, FULL],
        {
            **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 8, "head_dim": 256},
            **{"num_key_value_heads": 2, "linear_num_key_heads": 16, "linear_num_value_heads": 16},
            **{"vocab_size": 248320, "tie_word_embeddings": True},
        },
    ),
    "granite-4.0-h-micro": (
        "granitemoehybrid",
        40,
        [*[LINEAR] * 5, FULL, *[LINEAR] * 4],
        {
            **{"hidden_size": 2048, "shared_intermediate_size": 8192, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "mamba_n_heads": 64, "mamba_d_state": 128, "num_local_experts": 0},
            **{"vocab_size": 100352, "tie_word_embeddings": True, "num_experts_per_tok": 0},
        },
    ),
    "granite-4.0-h-tiny": (
        "granitemoehybrid",
        40,
        [*[LINEAR] * 5, FULL, *[LINEAR] * 4],
        {
            **{"hidden_size": 1536, "shared_intermediate_size": 1024, "num_attention_heads": 12},
            **{"num_key_value_heads": 4, "mamba_n_heads": 48, "mamba_d_state": 128, "num_local_experts": 64},
            **{"intermediate_size": 512, "num_experts_per_tok": 6},
            **{"vocab_size": 100352, "tie_word_embeddings": True},
        },
    ),
    "falcon-h1-0.5b": (
        "falcon_h1",
        36,
        [""] * 6,
        {
            **{"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8},
            **{"num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24},
            **{"mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "vocab_size": 32784},
        },
    ),
    "falcon-h1-1.5b": (
        "falcon_h1",
        24,
        [""] * 6,
        {
            **{"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 8},
            **{"num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072, "mamba_n_heads": 48},
            **{"mamba_d_head": 64, "mamba_d_state": 256, "mamba_n_groups": 1, "vocab_size": 65536},
        },
    ),
    "nemotron-nano-4b": (
        "nemotron_h",
        52,
        [LINEAR, MLP, LINEAR, MLP, LINEAR, MLP, LINEAR, FULL, MLP, LINEAR, MLP, LINEAR, MLP],
        {
            **{"hidden_size": 3072, "intermediate_size": 12288, "num_attention_heads": 32, "head_dim": 128},
            **{"num_key_value_heads": 8, "mamba_num_heads": 112, "mamba_head_dim": 64, "ssm_state_size": 128},
            **{"n_groups": 8, "vocab_size": 131072, "tie_word_embeddings": False},
        },
    ),
}
_OF_130M = {
    **{"hidden_size": 768, "num_heads": 24, "head_dim": 64, "n_groups": 1, "vocab_size": 50288},
    "tie_word_embeddings": True,
}
PURE: dict[str, Shape] = {  # beside them in bench/long_context.py
    "mamba2-130m": ("mamba2", 24, [""] * 6, _OF_130M | {"state_size": 128}),
    "mamba2-130m, 64 states": ("mamba2", 24, [""] * 6, _OF_130M | {"state_size": 64}),
}


def shape_of(name: str) -> Shape:
    """One of `SHAPES` or `PURE`; with `ALONE` behind its name, all its layers are recurrent."""
    kind, layers, period, fields = (SHAPES | PURE)[name.removesuffix(ALONE)]
    if name.endswith(ALONE):
        period = [LINEAR if one == FULL else one for one in period]
    return kind, layers, period, fields


def directory(shape: str) -> str:
    """Of its files."""
    return shape.replace(" ", "-").replace(",", "")


def configuration(shape: str, periods: int) -> Any:
    """Of a shape with so many periods of layers."""
    kind, _, period, fields = shape_of(shape)
    told = copy.deepcopy(fields)
    if kind == "nemotron_h":
        told["layers_block_type"] = period * periods
    else:
        told["num_hidden_layers"] = periods * len(period)
        if all(period):
            told["layer_types"] = period * periods
    return AutoConfig.for_model(kind, **told, pad_token_id=0, bos_token_id=0, eos_token_id=0)


@cache
def depths(shape: str, most: float) -> tuple[int, ...]:
    """Periods of the models that are measured: one, and as many as the whole model has or, if it is larger,
    as have `most` bytes of weights in bfloat16; at least two."""
    _, layers, period, _ = shape_of(shape)
    with torch.device("meta"):
        one, two = (
            2 * sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
            for config in (configuration(shape, 1), configuration(shape, 2))
        )
    return 1, min(layers // len(period), max(2, 1 + int((most - one) / (two - one))))


def extrapolated(shape: str, periods: Sequence[int], values: Sequence[float]) -> float:
    """Of the whole depth, from two models of other depths."""
    _, layers, period, _ = shape_of(shape)
    slope = (values[1] - values[0]) / (periods[1] - periods[0])
    return values[0] + (layers / len(period) - periods[0]) * slope


def made(folder: Path, shape: str, periods: int, name: str, llama: Path | None) -> Path:
    """A file or directory of a shape, as `VARIANTS` of bench/hybrids.py names it; made if it is not there.

    Args:
        folder: of all shapes. llama: where llama.cpp's programs are.
    """

    def write(target: Path) -> None:
        _write(folder, shape, periods, name, llama, target)

    return once(folder / directory(shape) / str(periods) / name, write)


def _write(folder: Path, shape: str, periods: int, name: str, llama: Path | None, target: Path) -> None:
    if name == "stock-bf16":
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(configuration(shape, periods), dtype=torch.bfloat16)
        model.save_pretrained(target)
        for file in BESIDE[2:]:
            shutil.copy(WORDS / file, target)
    else:
        stock = made(folder, shape, periods, "stock-bf16", llama)
        if name == "int8":
            checkpoint.pack(stock, target, dtype="int8", head="int8")
        elif name.startswith("bits-"):
            _codes(stock, target, float(name.removeprefix("bits-")))
        elif name == "BF16.gguf":
            checkpoint.export(stock, target, type="bf16", force=True)
        else:
            whole = made(folder, shape, periods, "BF16.gguf", llama)
            quantise(whole, target, name.removesuffix(".gguf"), llama)


def _codes(stock: Path, target: Path, bits: float) -> None:
    """A packed directory, every large matrix random codes."""
    target.mkdir()
    for name in BESIDE:
        if (stock / name).exists():
            shutil.copy(stock / name, target)
    read = packed.stream(stock)
    held: dict[str, PackedTensor] = {}
    for name, tensor in read.tensors.items():
        if ".experts." in name:
            held[name] = stacked(name, tensor.decode(), lambda one, value: coded(one, value.shape, bits))
        else:
            large = len(tensor.shape) == 2 and min(tensor.shape) > 64
            held[name] = coded(name, tensor.shape, bits) if large else tensor
    packed_file.write(target / PACKED, "transformers", held)
