"""Blocks that are computed on a GPU, one at a time, whatever holds the model otherwise.

While a walk stands at a block its weights are on the device; embedding, closed blocks and what is larger than
a share of the device's memory stay where they were. Who computes with hidden states brings them to the
block's device (`Block.device`), slab by slab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from sparsessm.architectures.ranks import Ranks
from sparsessm.architectures.residence import KEEPING, SHARE, Layer, Residence

AUTO = "auto"


def chosen(asked: str, ranks: Ranks) -> torch.device:
    """The device that was asked for; processes of one machine take turns in its GPUs.

    Args:
        asked: "cpu", "cuda", "cuda:N", or "auto": a GPU where there is one.

    Raises:
        ValueError: another word, or a GPU that is not there.
    """
    allowed = "allowed: cpu, cuda, cuda:N, auto"
    try:
        device = torch.device("cpu" if asked == AUTO else asked)
    except RuntimeError:
        raise ValueError(f"device is {asked!r}; {allowed}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {asked!r}; {allowed}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and not count:
        raise ValueError(f"device is {asked!r}, but this PyTorch ({torch.__version__}) sees no GPU")
    if asked == AUTO and count or device.type == "cuda" and device.index is None:
        device = torch.device("cuda", ranks.local % count)
    if device.type == "cuda" and device.index is not None and device.index >= count:
        raise ValueError(f"device is {asked!r}; GPUs here: {count}, from cuda:0 on")
    return device


@dataclass
class _Open:
    """An open block.

    Attributes:
        times: that it was opened. parameters: each with what holds its values elsewhere, and its version.
        buffers: module, name, and the buffer elsewhere.
    """

    times: int = 1
    parameters: list[tuple[nn.Parameter, nn.Parameter, int]] = field(default_factory=list)
    buffers: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)


@final
class OnDevice(Residence):
    """Of a model that another residence holds."""

    def __init__(self, inner: Residence, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self._open: dict[int, _Open] = {}

    def open(self, block: Layer) -> None:
        self.inner.open(block)
        if block.index in self._open:
            self._open[block.index].times += 1
            return
        here = self._open[block.index] = _Open()
        try:
            with torch.inference_mode(False):
                self._bring(here, block)
        except BaseException:  # the device has no room
            self.close(block)
            raise

    def _bring(self, here: _Open, block: Layer) -> None:
        for parameter in block.layer.parameters():
            twin = nn.Parameter(parameter.detach().to(self.device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, twin)
            here.parameters.append((parameter, twin, parameter._version))
        for module in block.layer.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    here.buffers.append((module, name, buffer))
                    module._buffers[name] = buffer.to(self.device)

    def close(self, block: Layer) -> None:
        here = self._open[block.index]
        here.times -= 1
        if not here.times:
            del self._open[block.index]
            with torch.inference_mode(False), torch.no_grad():
                self._bring_back(here, block)
        self.inner.close(block)

    def _bring_back(self, here: _Open, block: Layer) -> None:
        for parameter, twin, version in here.parameters:
            changed = parameter._version != version
            torch.utils.swap_tensors(parameter, twin)
            if changed:
                parameter.copy_(twin)
        for module, name, buffer in here.buffers:
            module._buffers[name] = buffer
        known = {id(parameter) for parameter, _, _ in here.parameters}
        for parameter in block.layer.parameters():
            if id(parameter) not in known and parameter.device == self.device:  # a layer came in its place
                twin = nn.Parameter(parameter.detach().cpu(), parameter.requires_grad)
                torch.utils.swap_tensors(parameter, twin)

    def value(self, parameter: Tensor) -> Tensor:
        return self.inner.value(parameter)

    def room(self, like: Tensor, *shape: int) -> Tensor:
        if like.element_size() * math.prod(shape) <= self._free() // SHARE:
            return like.new_empty(shape, device=self.device)
        return self.inner.room(like.cpu(), *shape)

    def release(self, states: Tensor) -> None:
        if states.device != self.device:
            self.inner.release(states)

    def at_once(self, nbytes: int, most: int, *, free: int) -> int:
        room = max(1, self._free() // (2 * nbytes))
        return min(room, self.inner.at_once(nbytes, most, free=min(free, room)))

    def spare(self) -> int:
        return self._free() // KEEPING

    def stays(self, nbytes: int) -> bool:
        return self.inner.stays(nbytes)

    def copied(self, model: nn.Module) -> tuple[Any, Residence]:
        copy, inner = self.inner.copied(model)
        return copy, OnDevice(inner, self.device)

    def _free(self) -> int:
        """Bytes of the device."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return KEEPING * self.inner.spare()
