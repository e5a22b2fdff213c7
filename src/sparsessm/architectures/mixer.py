"""What a kind of stock mixer is to the adapters: its matrices, its axes and its forward.

`mamba1.py` and `mamba2.py` are the kinds; a family says with a kind's fields what its own mixers have. Here
is what both kinds have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm import kernels
from sparsessm.architectures.axes import Axis
from sparsessm.architectures.base import Tap
from sparsessm.architectures.kept import Kept
from sparsessm.architectures.target import Target, removed_a_log


@dataclass(frozen=True)
class MixerKind(ABC):
    """How the mixers of a family are seen and run.

    Attributes:
        multiplied: the input of in_proj and its output rows have factors of their own (muP, FalconH1 alone).
    """

    multiplied: bool = False

    @abstractmethod
    def owns(self, module: Any) -> bool:
        """Whether a stock module is a mixer of this kind."""

    @abstractmethod
    def targets(
        self, mixer: Any, prefix: str, layer: int, stored: Mapping[str, torch.dtype]
    ) -> tuple[Target, ...]:
        """The matrices of a stock mixer in the order of the data; `prefix` is its full name and a dot."""

    @abstractmethod
    def axes(self, mixer: Any, prefix: str) -> tuple[Axis, ...]:
        """What can be taken out of a stock mixer whole; `prefix` is its name inside the layer and a dot."""

    @abstractmethod
    def forward(
        self,
        mixer: Any,
        x: Tensor,
        state: Any,
        taps: Mapping[str, Tap],
        until: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor | None, Any]:
        """The mixer over one slab: x (W, T, d_model), normalised -> (W, T, d_model) and the state after it.

        Args:
            state: what this returned for the slab before, None at the beginning. taps, until, kept: as in
                `Block.forward`.
        """


def feeding(taps: Mapping[str, Tap], until: str | None) -> Callable[[str, Tensor], bool]:
    """A function that hands a kind's inputs to its tap, if it has one, and says whether to stop there."""

    def fed(kind: str, what: Tensor) -> bool:
        if tap := taps.get(kind):
            tap.add(what)
        return kind == until

    return fed


def holds(module: Any, parameter: str) -> bool:
    """Whether a stock module itself has a parameter of this name."""
    return parameter in dict(module.named_parameters(recurse=False))


def matrices(
    mixer: Any,
    prefix: str,
    layer: int,
    stored: Mapping[str, torch.dtype],
    kinds: Sequence[str],
    fed_by: Mapping[str, tuple[str, int]],
) -> tuple[Target, ...]:
    """A target for each of these parts of a mixer, of either kind."""
    found = []
    for kind in kinds:
        state = kind == "A_log"
        part = mixer.A_log if state else mixer.get_submodule(kind)
        name, parameter = (prefix + kind, part) if state else (f"{prefix}{kind}.weight", part.weight)
        what: dict[str, Any] = {"module_class": type(mixer if state else part).__name__}
        dtype = stored.get(name, parameter.dtype)
        if state:
            skip = mixer.D, stored.get(f"{prefix}D", mixer.D.dtype)
            what |= {"removed": removed_a_log(dtype), "companions": {"D": skip}}
        family = {"A_log": "ssm", "conv1d": "conv1d"}.get(kind, "projections")
        what |= {"fed_by": fed_by.get(kind), "depthwise": kind == "conv1d"}
        found.append(Target(name, family, kind, layer, parameter, dtype, **what))
    return tuple(found)


def windows(mixer: Any, x: Tensor, before: Tensor | None) -> Tensor:
    """What each step's convolution sees: x (W, T, D) -> (W, T, D, K), the last tap first in time last."""
    past = mixer.conv_kernel_size - 1
    if before is None:
        before = x.new_zeros(x.shape[0], past, x.shape[2])
    return torch.cat([before, x], 1).unfold(1, past + 1, 1)


def convolve(mixer: Any, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convolution and activation of x (W, T, D) after `before` (W, K-1, D) -> result and next `before`."""
    past = mixer.conv_kernel_size - 1
    u = kernels.causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, before, silu=True)
    if before is None:
        before = x.new_zeros(x.shape[0], past, x.shape[2])
    return u, torch.cat([before, x[:, -past:]], 1)[:, -past:] if past else before


def precise(parameter: Tensor) -> Tensor:
    """float32 as in the stock forward, or float64 in a float64 model."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()
