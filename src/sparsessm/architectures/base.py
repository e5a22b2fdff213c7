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

Mamba-2 (Dao & Gu, arXiv 2405.21060) has one A, Δ and D for each of H heads of P channels (D = H P), and one B
and C for each of G groups of heads; its A_log is a matrix of one column here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# What a removed entry of A_log becomes, by the name of what it then computes. 38 is exact in bfloat16 and
# float32 and makes exp(Δ·A) exactly 0 for every Δ > 0 that occurs (A = -3e16), with no infinity that stock
# code could turn into NaN.
REMOVED_A_LOG: Mapping[str, float] = {"memoryless": 38.0, "unit": 0.0}
# In float16 -exp(38) is -Inf, and converters compute A in the dtype of the file. 11 leaves A = -59872 there,
# with room for an exp that is not rounded to the nearest (the largest float16 is 65504).
REMOVED_A_LOG_FLOAT16: Mapping[str, float] = {"memoryless": 11.0, "unit": 0.0}
# A removed entry of a linear layer is a missing connection.
REMOVED_WEIGHT: Mapping[str, float] = {"zero": 0.0}


def removed_a_log(stored: torch.dtype) -> Mapping[str, float]:
    """What a removed entry of an A_log becomes that a checkpoint holds in this dtype: name -> number."""
    return REMOVED_A_LOG_FLOAT16 if stored == torch.float16 else REMOVED_A_LOG


def rounded(values: Tensor, stored: torch.dtype) -> Tensor:
    """Values as a checkpoint holds them.

    Raises:
        ValueError: they do not fit the dtype. Nobody could write the result, so it is said where it arises.
    """
    held = values.to(stored)
    if stored.itemsize < values.element_size() and not torch.isfinite(held).all():
        if torch.isfinite(values).all():
            name, most = str(stored).removeprefix("torch."), torch.finfo(stored).max
            raise ValueError(
                f"a repaired value of {float(values.abs().max()):.3g} does not fit {name}, the dtype of its "
                f"tensor in the checkpoint (largest: {most:.6g}); store the model in bfloat16 or float32 "
                "first, or use repair 'none'"
            )
    return held


class Tap(Protocol):
    """What watches a target while its block runs (methods/observers.py).

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
        parameter: the live parameter or a view of it, [out, in] after flattening; for A_log [channel, state],
            in Mamba-2 [head, 1].
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
    parameter: Tensor
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
    def routed(self) -> bool:
        """Whether it sees only the tokens that a router sends it: a matrix of an expert."""
        return self.kind.startswith("experts.")

    @property
    def plain(self) -> bool:
        """Whether all tokens meet it, in its own block only: no expert's and not shared by blocks."""
        return not self.routed

    @property
    def matrix(self) -> Tensor:
        """The weight as a detached view [out, in]; a vector is one column."""
        parameter = self.parameter.detach()
        return parameter[:, None] if parameter.ndim == 1 else parameter.flatten(1)

    def replace(self, weight: Tensor) -> None:
        """Write a new weight [out, in], rounded to the stored dtype.

        Raises:
            ValueError: as `rounded`.
        """
        with torch.no_grad():
            self.parameter.copy_(rounded(weight, self.stored).view_as(self.parameter))

    def shift(self, companion: str, change: Tensor) -> None:
        """Add `change` to a companion parameter, rounded to its stored dtype.

        Raises:
            ValueError: as `rounded`.
        """
        parameter, stored = self.companions[companion]
        with torch.no_grad():
            parameter.copy_(rounded(parameter.double() + change.double(), stored))


@dataclass(frozen=True)
class Part:
    """Where the units of an axis lie in one tensor: unit i is start + i * width and the `width - 1` after it.

    Attributes:
        tensor: name inside the layer, e.g. "mixer.in_proj.weight". dim: the dimension they lie along.
    """

    tensor: str
    dim: int
    start: int = 0
    width: int = 1


@dataclass(frozen=True)
class Axis:
    """Units of a layer that can be taken out whole, in every tensor that has a place for them.

    A layer may have several axes of one name (the heads of each group, the states of each group): they choose
    their units apart and lose the same number.

    Attributes:
        name: "state", "channel" or "head". size: number of units. parts: all tensors that share the axis.
        write, read: rows that make what states take in, and what reads them, linearly: those of the kept ones
            may be replaced by any mixture of all. None where something that is not linear comes behind them
            (a norm, a SiLU).
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    write: Part | None = None
    read: Part | None = None


def cut(tensors: Mapping[str, Tensor], axes: Sequence[Axis], keeps: Sequence[Tensor]) -> dict[str, Tensor]:
    """A layer's tensors without the units that are not kept: every tensor that shares an axis gets smaller.

    Args:
        tensors: by name inside the layer. keeps: for each axis (units,) bool, True = kept.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    for axis, keep in zip(axes, keeps, strict=True):
        for part in axis.parts:
            length = tensors[part.tensor].shape[part.dim]
            mask = kept.setdefault((part.tensor, part.dim), torch.ones(length, dtype=torch.bool))
            mask[part.start : part.start + axis.size * part.width] &= keep.repeat_interleave(part.width)
    smaller = dict(tensors)
    for (name, dim), mask in kept.items():
        smaller[name] = smaller[name].index_select(dim, mask.nonzero()[:, 0])
    return smaller


class Block(ABC):
    """One layer of the model: residual stream in, residual stream out."""

    index: int
    name: str
    targets: tuple[Target, ...]  # in the order in which data meets them
    axes: tuple[Axis, ...] = ()  # what can be taken out of it whole
    layer: nn.Module  # the stock layer

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


class Tail(Block):
    """What follows the layers: the final norm and the head."""

    def __init__(
        self, norm: Any, head: Any, name: str, index: int, stored: Mapping[str, torch.dtype]
    ) -> None:
        self.index, self.name = index, name.removesuffix(".weight")
        self._norm = norm
        dtype = stored.get(name, head.weight.dtype)
        self.targets = (Target(name, "head", "lm_head", index, head.weight, dtype),)

    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
    ) -> tuple[Tensor | None, Any]:
        if tap := (taps or {}).get("lm_head"):
            tap.add(self._norm(hidden))
        return hidden, None

    def copy(self) -> Tail:
        return self  # the norm is never pruned


class Architecture(ABC):
    """A stock model seen as embedding, blocks and head; in evaluation mode and without gradients.

    Attributes:
        blocks: the layers.
        tail: a last block, identity on the residual stream, whose targets are behind the layers (the head).
        tied: the head's weight is the embedding.
        states: d_state.
        structure: the axes along which it can shrink to a stock model, "block" among them.
        projects: whether its states can be projected, for our runtime alone. widens: whether its layers can
            have channels of their own number, for our runtime alone.
        stored: parameter name -> dtype of its checkpoint.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    tail: Block
    tied: bool
    states: int
    structure: tuple[str, ...] = ()
    projects: bool = False
    widens: bool = False
    stored: Mapping[str, torch.dtype]

    @abstractmethod
    def fields(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The fields of the stock configuration that say that every layer has these sizes.

        Args:
            sizes: axis -> units of each of a layer's axes of that name; what is not named stays as it is.

        Raises:
            ValueError: stock code has no word for them.
        """

    def sizes(self, axis: str) -> list[int]:
        """All sizes smaller than now that stock code has a word for, ascending; of each of a layer's axes."""
        if axis == "block":
            return list(range(1, len(self.blocks)))
        now = next((a.size for block in self.blocks for a in block.axes if a.name == axis), 1)
        found = []
        for size in range(1, now):
            try:
                self.fields({axis: size})
            except ValueError:
                continue
            found.append(size)
        return found

    @abstractmethod
    def resize(self, block: Block, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Block:
        """Put a stock layer of another shape in the place of a block; the model's config is left as it is.

        Args:
            fields: of the stock configuration, in which the new layer differs.
            tensors: its state, by name inside the layer.

        Returns:
            The new block, which also takes its place in `blocks`.
        """

    def may_go(self, gone: Collection[int]) -> list[int]:
        """The blocks that can be taken out beside those that go already, so that stock code runs the rest."""
        return [block.index for block in self.blocks if block.index not in gone]

    @abstractmethod
    def drop(self, index: int) -> None:
        """Take a whole block out of the model; those behind it move up, config and `stored` follow."""

    def project(self, block: Block, B: Tensor, C: Tensor) -> Block:
        """Put projections of B and C (G, r, N) behind the convolution of a block's mixer (projected.py).

        Returns:
            The new block, which also takes its place in `blocks`.

        Raises:
            ValueError: there are none of this architecture.
        """
        raise ValueError(f"the states of a {type(self).__name__} model cannot be projected")

    def settle(self, fields: Mapping[str, Any]) -> None:
        """Write fields into the model's own configuration, when all layers have their new shapes."""
        for name, value in fields.items():
            setattr(self.model.config, name, value)

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


def renumbered(stored: Mapping[str, torch.dtype], layers: str, gone: int) -> dict[str, torch.dtype]:
    """The dtypes of a checkpoint whose layer number `gone` is taken out; `layers` is the name before it."""
    found = {}
    for name, dtype in stored.items():
        if name.startswith(layers):
            number, _, rest = name.removeprefix(layers).partition(".")
            if int(number) == gone:
                continue
            name = f"{layers}{int(number) - (int(number) > gone)}.{rest}"
        found[name] = dtype
    return found
