"""GGUF files as llama.cpp reads them, written down from its own code (src/models/mamba.cpp, mamba2.cpp and
the converter), not from ours; and models with tokenizers to make some of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from pico import pico_mamba
from torch import Tensor

import sparsessm

FORMS = gguf.GGMLQuantizationType
NAMES = {  # in transformers, of a layer -> in GGUF
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
OTHERS = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MATRICES = tuple(f"{name}.weight" for name in ("ssm_in", "ssm_x", "ssm_dt", "ssm_out", "embd", "output"))


def expected(source: Path) -> dict[str, Tensor]:
    """What the file must hold, in float32, from the tensors of the model as it is loaded."""
    loaded = sparsessm.load(source)
    config, found = loaded.model.config, {}
    state = loaded.model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, value in state.items():
        if name in OTHERS:
            found[OTHERS[name]] = value
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest == "mixer.conv1d.weight":
            value = value[:, 0]
            if f"backbone.layers.{layer}.mixer.conv1d.bias" not in state:
                found[f"blk.{layer}.ssm_conv1d.bias"] = torch.zeros(len(value))
        if rest == "mixer.A_log":
            value = -torch.exp(value)
        if rest in ("mixer.A_log", "mixer.D") and config.model_type == "mamba2":
            value = value[:, None]
        if rest == "mixer.norm.weight":
            value = value.view(config.n_groups, -1)
        found[f"blk.{layer}.{NAMES[rest]}"] = value
    return found


def fields_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def stored(value: Tensor, kind: str) -> tuple[str, bytes]:
    """The type and the bytes of a matrix: torch's own rounding, gguf's own blocks."""
    if kind in ("q8_0", "q4_0") and value.shape[1] % 32:
        kind = "f16"
    if kind in ("q8_0", "q4_0"):
        return kind, gguf.quants.quantize(value.numpy(), FORMS[kind.upper()]).tobytes()
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    return kind, value.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def same_blocks(found: Any, kind: str, content: bytes, value: Tensor) -> bool:
    """Whether data are these bytes, but for blocks whose values are exact only as they are."""
    if found.tobytes() == content or kind not in ("q8_0", "q4_0"):
        return found.tobytes() == content
    form = FORMS[kind.upper()]
    size, nbytes = gguf.GGML_QUANT_SIZES[form]
    wanted = np.frombuffer(content, np.uint8).reshape(-1, nbytes)
    other = (found.reshape(-1, nbytes) != wanted).any(1)
    read, rounded = (
        gguf.quants.dequantize(data, form)[other] for data in (found.reshape(-1, nbytes), wanted)
    )
    exact = value.numpy().reshape(-1, size)[other]
    return bool((read == exact).all() and (rounded != exact).any(1).all())


def with_tokenizer(folder: Path, tokenizer: Any, rows: int = 64) -> Path:
    pico_mamba(vocab_size=rows).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
