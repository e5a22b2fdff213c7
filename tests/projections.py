"""Mamba-2 models with projected states, in memory and on disk, and their recurrence by hand in float64."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import write_original
from lively import TOKENS, lively
from pico import pico_mamba2, pico_tokenizer
from planned import prune
from torch import Tensor

import sparsessm
from sparsessm.architectures import adapt, projected
from sparsessm.checkpoint import Checkpoint
from sparsessm.recipe.recipe import Recipe

NAME = "backbone.layers.{}.mixer.{}"
B1, C1 = (NAME.format(1, matrix) for matrix in projected.MATRICES)
WORDS = {"pattern": "structured:state", "method": "balanced", "sparsity": 0.5}
FAST: dict[str, Any] = {"samples": 3, "length": 16, "data": "text.txt"}
ODD = {"hidden_size": 15, "num_heads": 6, "head_dim": 5, "n_groups": 3, "state_size": 7}
WIDE = {"hidden_size": 72, "num_heads": 3, "head_dim": 48, "n_groups": 1, "state_size": 20}
MANY = {"n_groups": 1, "state_size": 40}
Case = tuple[dict[str, Any], dict[int, int]]
CASES: dict[str, Case] = {
    "two groups, 3 and 5 of 8": ({}, {0: 3, 1: 5}),
    "one direction": ({"n_groups": 1}, {0: 1, 1: 1}),
    "as many groups as heads, all but one": ({"n_groups": 4}, {0: 7, 1: 7}),
    "all directions": ({}, {0: 8, 1: 8}),
    "the second layer only": ({}, {1: 2}),
    "the first layer only": ({"tie_word_embeddings": True}, {0: 2}),
    "odd sizes, biases": ({**ODD, "use_bias": True}, {0: 6, 1: 1}),
    "heads of 48 channels, 17 and 16": (WIDE, {0: 17, 1: 16}),
    "33 and 15 of 40": (MANY, {0: 33, 1: 15}),
    "one of two states": ({"state_size": 2, "use_conv_bias": False}, {0: 1, 1: 2}),
    "one tap": ({"conv_kernel": 1}, {0: 3, 1: 3}),
    "bounded steps": ({"time_step_limit": (0.02, 0.1)}, {0: 3, 1: 4}),
    "heads of one channel": ({"num_heads": 32, "head_dim": 1}, {0: 4, 1: 3}),
}
FORGETS = "heads without memory"  # the same with A_log = 38 here and there
cases = pytest.mark.parametrize("case", [*CASES, FORGETS])


def with_projections(model: Any, directions: Mapping[int, int], seed: int = 0) -> Any:
    """Random ones, so that what is projected wrongly shows."""
    draw = torch.Generator().manual_seed(seed)
    projected.attach(model, directions)
    for index in directions:
        for name in projected.MATRICES:
            matrix = getattr(model.backbone.layers[index].mixer, name)
            matrix.data.copy_(torch.randn(matrix.shape, generator=draw) / matrix.shape[2] ** 0.5)
    return model.eval()


def made(case: str) -> Any:
    fields, directions = ({}, {0: 3, 1: 5}) if case == FORGETS else CASES[case]
    model = lively(pico_mamba2(**fields))
    if case == FORGETS:
        model.backbone.layers[0].mixer.A_log.data[1::2] = 38.0
        model.backbone.layers[1].mixer.A_log.data[:] = 38.0
    return with_projections(model, directions)


def by_hand(model: Any, tokens: Tensor) -> Tensor:
    """Token by token in float64, each head for itself."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, channels, groups, states = c.num_heads, c.head_dim, c.n_groups, c.state_size
    inner, eps, (low, high) = heads * channels, c.layer_norm_epsilon, c.time_step_limit

    def normed(x: Tensor, weight: Tensor, parts: int = 1) -> Tensor:
        x = x.unflatten(-1, (parts, -1))
        return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight

    def zero(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    found = []
    for row in tokens:
        stream = [w["backbone.embeddings.weight"][token] for token in row.tolist()]
        for layer in range(c.num_hidden_layers):
            m = {name.split(f"layers.{layer}.")[1]: t for name, t in w.items() if f".layers.{layer}." in name}
            taps = m["mixer.conv1d.weight"][:, 0]  # (M, K)
            window = [zero(len(taps))] * taps.shape[1]
            h: dict[int, Tensor] = {}
            for t, x in enumerate(stream):
                bias = m.get("mixer.in_proj.bias", 0.0)
                fed = m["mixer.in_proj.weight"] @ normed(x, m["norm.weight"]) + bias
                z, mixed, step = fed.split([inner, len(taps), heads])
                window = [*window[1:], mixed]
                mixed = torch.stack([each * taps[:, k] for k, each in enumerate(window)]).sum(0)
                mixed = mixed + m.get("mixer.conv1d.bias", 0.0)
                mixed = mixed / (1 + torch.exp(-mixed))
                y = []
                for head in range(heads):
                    g = head // (heads // groups)
                    b = mixed[inner + g * states : inner + (g + 1) * states]
                    at = inner + (groups + g) * states
                    readout = mixed[at : at + states]
                    if "mixer.B_projection" in m:
                        b = m["mixer.B_projection"][g] @ b
                        readout = m["mixer.C_projection"][g] @ readout
                    size = torch.log1p(torch.exp(step[head] + m["mixer.dt_bias"][head])).clamp(low, high)
                    u = mixed[head * channels : (head + 1) * channels]
                    decay = torch.exp(-size * torch.exp(m["mixer.A_log"][head]))
                    before = h.get(head, torch.zeros(channels, len(b), dtype=torch.float64))
                    h[head] = decay * before + size * torch.outer(u, b)
                    y.append(h[head] @ readout + m["mixer.D"][head] * u)
                gated = torch.cat(y) * z / (1 + torch.exp(-z))
                out = m["mixer.out_proj.weight"] @ normed(gated, m["mixer.norm.weight"], groups)
                stream[t] = x + out + m.get("mixer.out_proj.bias", 0.0)
        head = w.get("lm_head.weight", w["backbone.embeddings.weight"])
        found.append(torch.stack([head @ normed(x, w["backbone.norm_f.weight"]) for x in stream]))
    return torch.stack(found)


def settled(model: Any, tokens: Tensor = TOKENS, **recipe: Any) -> tuple[Any, list[Any]]:
    """A copy of the model after a run, and its rows."""
    architecture = adapt(copy.deepcopy(model))
    asked = Recipe(**WORDS | recipe).resolved(model="m", trained_length=tokens.shape[1])
    return architecture.model, prune(architecture, asked, tokens).rows


def write_dense(folder: Path, layout: str = "transformers", dtype: torch.dtype = torch.bfloat16) -> None:
    """In place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    if layout == "state-spaces":
        model = lively(pico_mamba2(n_groups=1))
        told = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 8, "ngroups": 1}
        write_original(folder, model, dtype, ssm_cfg=told)
        pico_tokenizer(60).save_pretrained(folder)
        return
    lively(pico_mamba2()).to(dtype).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)


def write_projected(folder: Path, layout: str = "transformers") -> Checkpoint:
    """A dense checkpoint "dense" pruned by `balanced` into a directory; what is in memory."""
    write_dense(Path("dense"), layout)
    model = sparsessm.load("dense")
    report = sparsessm.prune(model, **WORDS, **FAST, measure=False)
    sparsessm.save(model, folder, report)
    return model


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))
