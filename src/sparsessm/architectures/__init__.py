"""`adapt(model)`: a stock transformers model -> its adapter; `MODEL_TYPES` has one row a model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from sparsessm.architectures.axes import Axis, Part
from sparsessm.architectures.base import Architecture, Block, Tail, Tap
from sparsessm.architectures.hybrid import Bamba, FalconH1, GraniteMoeHybrid, Hybrid, Jamba, NemotronH, Zamba2
from sparsessm.architectures.hybrid_delta import KimiLinear, OlmoHybrid, Qwen3Next, Qwen35, Qwen35Moe
from sparsessm.architectures.ranks import here
from sparsessm.architectures.residence import InMemory, Residence
from sparsessm.architectures.stack import FalconMamba, Mamba, Mamba2, Stack
from sparsessm.architectures.target import (
    REMOVED_A_LOG,
    REMOVED_A_LOG_FLOAT16,
    REMOVED_WEIGHT,
    Target,
    removed_a_log,
)
from sparsessm.kernels import products

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
    "qwen3_5_text": Qwen35,
    "qwen3_5_moe_text": Qwen35Moe,
    "qwen3_next": Qwen3Next,
    "olmo_hybrid": OlmoHybrid,
    "kimi_linear": KimiLinear,
}

__all__ = [
    "MODEL_TYPES",
    "REMOVED_A_LOG",
    "REMOVED_A_LOG_FLOAT16",
    "REMOVED_WEIGHT",
    "Architecture",
    "Axis",
    "Block",
    "InMemory",
    "Part",
    "Residence",
    "Tail",
    "Tap",
    "Target",
    "adapt",
    "refuse_older",
    "removed_a_log",
]


def refuse_older(model_type: str, groups: int = 1) -> None:
    """Refuse what stock code older than our adapters computes otherwise.

    Args:
        groups: of heads in a Mamba-2.

    Raises:
        ValueError: a release of transformers that does not know the type; one before 5 for a hybrid, or for
            a Mamba-2 of several groups.
    """
    if model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model type {model_type!r} is not known to transformers {transformers.__version__}; install a "
            "newer release"
        )
    if int(transformers.__version__.split(".")[0]) >= 5:
        return
    if issubclass(MODEL_TYPES[model_type], Hybrid):
        raise ValueError(
            f"model type {model_type!r} needs transformers 5 or newer; installed: {transformers.__version__}"
        )
    if groups > 1:
        raise ValueError(
            f"n_groups is {groups}: transformers before 5 normalises all groups of a Mamba-2 together, "
            "which is wrong for this model; install transformers 5"
        )


def adapt(
    model: nn.Module,
    stored: Mapping[str, torch.dtype] | None = None,
    residence: Residence | None = None,
    compute: str = "float32",
) -> Architecture:
    """Wrap a transformers causal language model.

    Args:
        model: e.g. `MambaForCausalLM`, in float32.
        stored: parameter name -> dtype of its checkpoint; pruned values are rounded to it. Not given: the
            live dtype.
        residence: where its weights are; None: all in memory.
        compute: the precision of products where its blocks are walked over: "float32", "bfloat16", or "auto".

    Raises:
        ValueError: the model type has no adapter; the supported ones are listed. Or as `refuse_older`.
    """
    stock = isinstance(model, transformers.PreTrainedModel)
    model_type = model.config.model_type if stock else type(model).__name__
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model type {model_type!r} has no adapter; supported: {', '.join(sorted(MODEL_TYPES))}"
        )
    config: Any = model.config
    refuse_older(model_type, config.n_groups if model_type == "mamba2" else 1)
    model.eval()
    architecture = MODEL_TYPES[model_type](model, stored or {})
    if residence is not None:
        architecture.residence = residence
    architecture.compute = products.choose(compute)
    architecture.ranks = here()
    return architecture
