"""Checkpoints of every architecture, loaded whole and block by block, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from pico_hybrids import DISTINCT, NEW, pico_hybrid
from torch import Tensor

from sparsessm import Run
from sparsessm.checkpoint import Checkpoint, Journal, Streaming, load, unfinished
from sparsessm.report.record import Report

TOKENS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))
MODELS: Mapping[str, Callable[..., Any]] = {
    "mamba": pico_mamba,
    "falcon_mamba": pico_falcon_mamba,
    "mamba2": pico_mamba2,
    **({name: lambda name=name: pico_hybrid(name) for name in DISTINCT} if NEW else {}),
}
NOTHING = Streaming(1)  # no byte may stay: every block and all hidden states are on the disk
PLENTY = 1 << 40


def written(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A pico model of this name as a stock checkpoint."""
    MODELS[name]().to(dtype).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What each tensor of the model holds, wherever it is."""
    state = checkpoint.model.state_dict(keep_vars=True)
    return {name: checkpoint.residence.value(tensor).clone() for name, tensor in state.items()}


def plain(report: Report) -> str:
    """A record without the seconds."""
    return json.dumps({**report.record(), "seconds": 0}, sort_keys=True)


def pruned(source: Path, streaming: Streaming | None, **fields: Any) -> tuple[Checkpoint, Report]:
    """A run on a checkpoint, whole or block by block, with perplexity left out."""
    checkpoint = load(source, streaming=streaming)
    return checkpoint, Run(checkpoint, length=40, **fields).prune(TOKENS, measure=False)


def journalled(source: Path, out: Path, *, resume: bool, **fields: Any) -> tuple[dict[str, Tensor], str]:
    """A run that keeps what it does; what the tensors hold in the end, and its record."""
    with unfinished(out, resume=resume) as journal:
        return in_journal(source, journal, **fields)


def in_journal(
    source: Path, journal: Journal, memory: int = 1, tokens: Tensor = TOKENS, **fields: Any
) -> tuple[dict[str, Tensor], str]:
    checkpoint = load(source, streaming=Streaming(memory, journal.folder))
    journal.holds(checkpoint.residence)
    report = Run(checkpoint, journal=journal, length=40, **fields).prune(tokens, measure=False)
    return values(checkpoint), plain(report)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit; NaN apart."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
