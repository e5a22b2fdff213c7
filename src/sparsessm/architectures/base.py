"""WHAT can be pruned in a model: the words every adapter speaks.

An adapter wraps a stock transformers model. It declares the prunable matrices (`Target`) of each layer
(`Block`) and computes the layer's forward with the model's own weights around our kernels, in slabs of time,
so that calibration can advance all windows together. It knows nothing of methods: what is measured comes in
as a `Tap`.

Letters used in formulas, here and in the kernels (Gu & Dao, arXiv 2312.00752):

    W windows · L tokens a window · T tokens a slab · D channels (d_inner) · N states a channel (d_state)
    K width of the convolution · u input of the scan (W, T, D) · Δ or delta, step size (W, T, D)
    A = -exp(A_log) (D, N) · B, C input and readout (W, T, N) · D skip weight (D,) · z gate (W, T, D)
    h state (W, D, N): h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = (C_t·h_t + D u_t)·silu(z_t)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# What a removed entry of A_log becomes, by the name of what it then computes. 38 is exact in float16,
# bfloat16 and float32 and makes exp(Δ·A) exactly 0 for every Δ > 0 that occurs (A = -3e16), with no infinity
# that stock code could turn into NaN.
REMOVED_A_LOG: Mapping[str, float] = {"memoryless": 38.0, "unit": 0.0}
# A removed entry of a linear layer is a missing connection.
REMOVED_WEIGHT: Mapping[str, float] = {"zero": 0.0}


class Tap(Protocol):
    """What watches a target while its block runs (observers.py).

    The tap of a linear layer is fed its inputs, `add(x)` with x (W, T, in). That of `A_log` is fed what the
    scan summed, `add(stats, out_proj, y)`, with the weight (d_model, D) that its output y (W, T, D) meets
    next; `options` go to `selective_scan_stats`.
    """

    options: Mapping[str, Any]

    def add(self, *what: Any, **how: Any) -> None: ...


@dataclass(frozen=True)
class Target:
    """One prunable matrix and what it means.

    Attributes:
        name: full parameter name, e.g. "backbone.layers.0.mixer.A_log".
        family: "ssm" (A_log), "projections" (linear layers), "conv1d" or "head".
        kind: the parameter's own name inside its layer, e.g. "A_log", "in_proj".
        layer: index of its block.
        parameter: the live parameter, [out, in] after flattening; for A_log [channel, state].
        stored: dtype in which the checkpoint holds it; values are rounded to it, so that what we measure is
            what gets saved.
        removed: name of a removed value -> the number stored for it.
        module_class: class name of the module that owns the parameter, for selectors.
        companions: parameters that a repair of this target may change, by name, with their stored dtype.
        fed_by: (kind, rows): its inputs are these output rows of that target, with nothing in between.
        depthwise: every row has inputs of its own (a depthwise convolution's taps).
    """

    name: str
    family: str
    kind: str
    layer: int
    parameter: nn.Parameter
    stored: torch.dtype
    removed: Mapping[str, float] = field(default_factory=lambda: REMOVED_WEIGHT)
    module_class: str = "Linear"
    companions: Mapping[str, tuple[nn.Parameter, torch.dtype]] = field(default_factory=dict)
    fed_by: tuple[str, int] | None = None
    depthwise: bool = False

    @property
    def module(self) -> str:
        """The name that selectors match: that of the module for a weight, the parameter's for A_log."""
        return self.name.removesuffix(".weight")

    @property
    def matrix(self) -> Tensor:
        """The weight as a detached view [out, in]."""
        return self.parameter.detach().flatten(1)

    def replace(self, weight: Tensor) -> None:
        """Write a new weight [out, in], rounded to the stored dtype."""
        with torch.no_grad():
            self.parameter.copy_(weight.to(self.stored).view_as(self.parameter))

    def shift(self, companion: str, change: Tensor) -> None:
        """Add `change` to a companion parameter, rounded to its stored dtype."""
        parameter, stored = self.companions[companion]
        with torch.no_grad():
            parameter.copy_((parameter.double() + change.double()).to(stored))


class Block(ABC):
    """One layer of the model: residual stream in, residual stream out."""

    index: int
    name: str
    targets: tuple[Target, ...]  # in the order in which data meets them

    @abstractmethod
    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
    ) -> tuple[Tensor | None, Any]:
        """Run a slab (W, T, d_model) after `state` (None: the beginning); returns output and next state.

        Args:
            taps: a target's kind -> what watches it.
            until: stop once the tap of this kind was fed; the output is then None.
        """

    @abstractmethod
    def copy(self) -> Block:
        """The same block with weights of its own, which later changes of the model do not touch."""


class Architecture(ABC):
    """A stock model seen as embedding, blocks and head; in evaluation mode and without gradients.

    Attributes:
        blocks: the layers.
        tail: a last block, identity on the residual stream, whose targets are behind the layers (the head).
        tied: the head's weight is the embedding.
        states: d_state.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    tail: Block
    tied: bool
    states: int

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """(W, L) token ids -> (W, L, d_model), a new tensor."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """(..., d_model) after the last block -> (..., vocabulary): final norm and output projection."""

    @property
    def targets(self) -> Iterator[Target]:
        return (target for block in (*self.blocks, self.tail) for target in block.targets)

    def final(self, tokens: Tensor) -> Tensor:
        """(W, L) token ids -> (W, L, d_model), after the last block and before the final norm."""
        with torch.inference_mode():
            hidden = self.embed(tokens)
            for block in self.blocks:
                out, _ = block.forward(hidden)
                assert out is not None
                hidden = out
            return hidden

    def logits(self, tokens: Tensor) -> Tensor:
        """(W, L) token ids -> (W, L, vocabulary)."""
        with torch.inference_mode():
            return self.head(self.final(tokens))
