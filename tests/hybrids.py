"""Adapters of pico hybrids, and taps that keep what they hear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pico_hybrids import pico_hybrid
from torch import Tensor

from sparsessm.architectures import Block, Target, adapt
from sparsessm.architectures.hybrid import Hybrid
from sparsessm.architectures.hybrid_block import HybridBlock

MORE_TOKENS = torch.randint(0, 64, (6, 37), generator=torch.Generator().manual_seed(1))
MIXTURES = ("jamba", "nemotron_h", "granitemoehybrid")
ROUTERS = ("router", "gate", "shared_expert_gate")


def hybrid(name: str, **overrides: Any) -> Hybrid:
    architecture = adapt(pico_hybrid(name, **overrides))
    assert isinstance(architecture, Hybrid)
    return architecture


def blocks_of(architecture: Hybrid) -> list[HybridBlock]:
    return [block for block in architecture.blocks if isinstance(block, HybridBlock)]


def by_kind(block: Block) -> dict[str, Target]:
    return {target.kind: target for target in block.targets}


class Listener:
    """A tap that keeps all it hears."""

    options: Mapping[str, Any] = {"gram": "full"}
    paired = routed = False

    def __init__(self, kind: str = "", heard: list[str] | None = None) -> None:
        self.kind, self.heard = kind, [] if heard is None else heard
        self.what: list[Any] = []

    def add(self, *what: Any) -> None:
        self.heard.append(self.kind)
        self.what.append(what)
        assert len(what) > 1 or what[0].ndim >= 3  # windows, time, inputs

    @property
    def rows(self) -> Tensor:
        """All inputs of a linear layer, a row a token, window after window."""
        return torch.cat([x.flatten(0, 1) for (x,) in self.what])


def slabs(block: Block, hidden: Tensor, width: int, **how: Any) -> Tensor | None:
    """A block's output, slab after slab; None where it stopped early."""
    state, parts = None, []
    for start in range(0, hidden.shape[1], width):
        out, state = block.forward(hidden[:, start : start + width], state, **how)
        parts.append(out)
    assert all(out is None for out in parts) or all(out is not None for out in parts)
    return None if parts[0] is None else torch.cat(parts, 1)


def one_sided(name: str) -> Hybrid:
    """A mixture whose first experts get all tokens."""
    architecture = hybrid(name)
    for module_name, module in architecture.model.named_modules():
        if module_name.rpartition(".")[2] in ROUTERS:
            weight: Any = getattr(module, "weight", None)
            if weight is not None and weight.shape == (4, 16):
                with torch.no_grad():
                    weight.zero_()
                if hasattr(module, "e_score_correction_bias"):
                    bias: Any = module.e_score_correction_bias
                    bias.copy_(torch.tensor([3.0, 2.0, 0.0, -1.0]))
    return architecture


def shared_targets(architecture: Hybrid) -> list[Target]:
    return [target for target in architecture.targets if target.uses]
