"""A matrix that can be pruned: where it lies, what a removed value becomes, how a new value is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Target:
    """One prunable matrix and what it means.

    Attributes:
        name: full parameter name, e.g. "backbone.layers.0.mixer.A_log".
        family: "ssm" (A_log), "projections" (linear layers), "conv1d", "head", or "embedding" where the head
            has weights of its own.
        kind: the parameter's own name inside its layer, e.g. "A_log", "in_proj".
        layer: index of its block.
        parameter: the live parameter, [out, in] after flattening; for A_log [channel, state], in Mamba-2
            [head, 1].
        stored: dtype in which the checkpoint holds it; values are rounded to it, so that what we measure is
            what gets saved.
        removed: name of a removed value -> the number stored for it.
        module_class: class name of the module that owns the parameter, for selectors.
        companions: parameters that a repair of this target may change, by name, with their stored dtype.
        fed_by: (kind, rows): its inputs are these output rows of that target, with nothing in between.
        depthwise: every row has inputs of its own (a depthwise convolution's taps).
        uses: indices of all blocks whose data meets it, ascending, where several share it; it is a target of
            the first of them. `Stop.look` sees them all.
        reads: what those of a block that read the very same inputs have in common; "" where it is alone.
        slice: of a parameter (E, out, in) that holds the matrices of all experts, which of them; else None.
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
    uses: tuple[int, ...] = ()
    reads: str = ""
    slice: int | None = None

    @property
    def module(self) -> str:
        """The name that selectors match: that of the module for a weight, the parameter's for A_log."""
        return self.name.removesuffix(".weight")

    @property
    def routed(self) -> bool:
        """Whether it sees only the tokens that a router sends it: a matrix of an expert."""
        return self.kind.startswith("experts.")

    @property
    def looked_up(self) -> bool:
        """Whether its rows are looked up: it has no inputs that anything could observe."""
        return self.family == "embedding"

    @property
    def plain(self) -> bool:
        """Whether all tokens meet it, in its own block only: no expert's and not shared by blocks."""
        return not self.routed and not self.uses

    @property
    def matrix(self) -> Tensor:
        """The weight as a detached view [out, in]; a vector is one column, whatever its shape is."""
        parameter = self._values
        vector = parameter.ndim == 1 or parameter.shape[0] == 1 and self.family == "ssm"
        return parameter.view(-1, 1) if vector else parameter.flatten(1)

    def replace(self, weight: Tensor) -> None:
        """Write a new weight [out, in], rounded to the stored dtype.

        Raises:
            ValueError: as `rounded`.
        """
        with torch.no_grad():
            self._values.copy_(rounded(weight, self.stored).view_as(self._values))

    def replace_exactly(self, weight: Tensor) -> None:
        """Write a new weight [out, in] as it is: on a grid, of which a packed file holds every value exactly,
        whatever the stored dtype."""
        with torch.no_grad():
            self._values.copy_(weight.view_as(self._values))

    @property
    def _values(self) -> Tensor:
        """Its part of the parameter, outside of any graph; a residence may move that, so ask anew."""
        values = self.parameter.detach()
        return values if self.slice is None else values[self.slice]

    def shift(self, companion: str, change: Tensor) -> None:
        """Add `change` to a companion parameter, rounded to its stored dtype.

        Raises:
            ValueError: as `rounded`.
        """
        parameter, stored = self.companions[companion]
        with torch.no_grad():
            parameter.copy_(rounded(parameter.double() + change.double(), stored))
