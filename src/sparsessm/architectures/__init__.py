"""`adapt(model)`: a stock transformers model -> its adapter; `MODEL_TYPES` has one row a model type."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sparsessm.architectures.base import (
    REMOVED_A_LOG,
    Architecture,
    Axis,
    Block,
    Part,
    Tail,
    Tap,
    Target,
)
from sparsessm.architectures.hybrid import Bamba, FalconH1, GraniteMoeHybrid, Hybrid, Jamba, NemotronH, Zamba2
from sparsessm.architectures.hybrid_block import SharedTarget, seen_by_all_uses
from sparsessm.architectures.stack import FalconMamba, Mamba, Mamba2, Stack

MODEL_TYPES: Mapping[str, type[Stack | Hybrid]] = {
    "mamba": Mamba,
    "falcon_mamba": FalconMamba,
    "mamba2": Mamba2,
    "bamba": Bamba,
    "falcon_h1": FalconH1,
    "granitemoehybrid": GraniteMoeHybrid,
    "jamba": Jamba,
    "nemotron_h": NemotronH,
    "zamba2": Zamba2,
}

__all__ = [
    "MODEL_TYPES",
    "REMOVED_A_LOG",
    "Architecture",
    "Axis",
    "Block",
    "Part",
    "SharedTarget",
    "Tail",
    "Tap",
    "Target",
    "adapt",
    "seen_by_all_uses",
]


def adapt(model: nn.Module, stored: Mapping[str, torch.dtype] | None = None) -> Architecture:
    """Wrap a transformers causal language model.

    Args:
        model: e.g. `MambaForCausalLM`, in float32.
        stored: parameter name -> dtype of its checkpoint; pruned values are rounded to it. Not given: the
            live dtype.

    Raises:
        ValueError: the model type has no adapter; the supported ones are listed.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model type {model_type!r} has no adapter; supported: {', '.join(sorted(MODEL_TYPES))}"
        )
    model.eval()
    return MODEL_TYPES[model_type](model, stored or {})
