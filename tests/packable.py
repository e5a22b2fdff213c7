"""Directories of every kind that can be packed: families, formats, dtypes, names, pruned and dense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from directories import write_mixed, write_original
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from pico_hybrids import DISTINCT, FAMILIES, VARIANTS, pico_hybrid
from projections import write_projected
from safetensors.torch import load_file, save_file

import sparsessm
from sparsessm import checkpoint


def stock(folder: Path, model: Any, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    pico_tokenizer().save_pretrained(folder)
    return folder


def edited(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], *, form: str = "safetensors"
) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, file, {"format": "pt"})
    return folder


def mixed_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    for number, name in enumerate(tensors):
        tensors[name] = tensors[name].to((torch.float32, torch.bfloat16, torch.float16)[number % 3])


def bare(folder: Path) -> Path:
    stock(folder, pico_mamba().backbone)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def under_the_other_name(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("backbone.embeddings.weight")


def original(folder: Path, **fields: Any) -> Path:
    write_original(folder, pico_mamba(**fields), torch.float16, ssm_cfg={"d_state": 8})
    pico_tokenizer(60).save_pretrained(folder)
    return folder


def pruned(folder: Path, model: Any, **recipe: Any) -> Path:
    came = checkpoint.load(stock(folder.with_name("dense"), model.bfloat16()))
    report = sparsessm.prune(came, method="magnitude", measure=False, **recipe)
    sparsessm.save(came, folder, report)
    return folder


def without_generation(folder: Path) -> Path:
    (stock(folder, pico_mamba()) / "generation_config.json").unlink()
    return folder


def projected(folder: Path) -> Path:
    write_projected(Path("half"))
    return shutil.move("half", folder)


SOURCES: dict[str, Callable[[Path], Any]] = {
    **{name: lambda f, n=name: stock(f, pico_hybrid(n).bfloat16()) for name in [*FAMILIES, *VARIANTS]},
    **{
        f"{name} sharded": lambda f, n=name: stock(f, pico_hybrid(n), max_shard_size="20KB")
        for name in DISTINCT
    },
    "jamba mixed": lambda f: edited(stock(f, pico_hybrid("jamba")), mixed_dtypes),
    "jamba bin": lambda f: edited(stock(f, pico_hybrid("jamba")), mixed_dtypes, form="bin"),
    "nemotron_h mixed": lambda f: edited(stock(f, pico_hybrid("nemotron_h")), mixed_dtypes),
    "nemotron_h as in memory": lambda f: stock(f, pico_hybrid("nemotron_h"), save_original_format=False),
    "jamba as in memory": lambda f: stock(f, pico_hybrid("jamba"), save_original_format=False),
    "nemotron_h with extra tensors": lambda f: edited(
        stock(f, pico_hybrid("nemotron_h")), lambda tensors: tensors.update({"mtp.x": torch.arange(7)})
    ),
    "one expert": lambda f: stock(f, pico_hybrid("nemotron_h", n_routed_experts=1, num_experts_per_tok=1)),
    "mamba mixed": lambda f: write_mixed(f, torch.float16),
    "mamba untied": lambda f: stock(f, pico_mamba(tie_word_embeddings=False)),
    "mamba under the other name": lambda f: edited(stock(f, pico_mamba()), under_the_other_name),
    "mamba without generation_config": without_generation,
    "mamba bare": bare,
    "mamba2": lambda f: stock(f, pico_mamba2().half()),
    "falcon": lambda f: stock(f, pico_falcon_mamba()),
    "original": original,
    "original untied": lambda f: original(f, tie_word_embeddings=False),
    "pruned ssm": lambda f: pruned(f, pico_mamba(), target="ssm", sparsity=0.5),
    "pruned 2:4": lambda f: pruned(f, pico_mamba2(), pattern="2:4"),
    "pruned experts": lambda f: pruned(f, pico_hybrid("jamba"), sparsity=0.5),
    "projected": projected,
}
