"""`adapt(model)`: a stock transformers model -> its adapter; `MODEL_TYPES` has one row a model type."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from torch import nn

from sparsessm.architectures.base import (
    REMOVED_A_LOG,
    REMOVED_A_LOG_FLOAT16,
    Architecture,
    Axis,
    Block,
    Part,
    Tail,
    Tap,
    Target,
    removed_a_log,
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
    "REMOVED_A_LOG_FLOAT16",
    "Architecture",
    "Axis",
    "Block",
    "Part",
    "SharedTarget",
    "Tail",
    "Tap",
    "Target",
    "adapt",
    "refuse_older",
    "removed_a_log",
    "seen_by_all_uses",
]


def refuse_older(model_type: str) -> None:
    """Refuse hybrids where their stock code is older than our adapters for it.

    Raises:
        ValueError: transformers before 5.
    """
    if issubclass(MODEL_TYPES[model_type], Hybrid) and int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"model type {model_type!r} needs transformers 5 or newer; installed: {transformers.__version__}"
        )


def adapt(model: nn.Module, stored: Mapping[str, torch.dtype] | None = None) -> Architecture:
    """Wrap a transformers causal language model.

    Args:
        model: e.g. `MambaForCausalLM`, in float32.
        stored: parameter name -> dtype of its checkpoint; pruned values are rounded to it. Not given: the
            live dtype.

    Raises:
        ValueError: the model type has no adapter; the supported ones are listed. Or as `refuse_older`.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model type {model_type!r} has no adapter; supported: {', '.join(sorted(MODEL_TYPES))}"
        )
    refuse_older(model_type)
    model.eval()
    return MODEL_TYPES[model_type](model, stored or {})
