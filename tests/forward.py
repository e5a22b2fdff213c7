"""The whole forward of an adapted model, block after block by the one walk."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.walk import final


def states_of(architecture: Architecture, tokens: Tensor) -> Tensor:
    """(W, L) token ids -> (W, L, d_model), after the last block and before the final norm."""
    return final(architecture, tokens)[0]


def logits_of(architecture: Architecture, tokens: Tensor) -> Tensor:
    """(W, L) token ids -> (W, L, vocabulary)."""
    with torch.inference_mode():
        return architecture.head(states_of(architecture, tokens))
