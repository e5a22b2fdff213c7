"""Blocks that are computed on a GPU, one at a time, whatever holds the model otherwise.

While a walk stands at a block its weights are on the device; embedding, closed blocks and what is larger than
a share of the device's memory stay where they were. Who computes with hidden states brings them to the
block's device (`Block.device`), slab by slab.

The block that comes next is copied meanwhile into memory that the device reads by itself (pinned), where
there is room for it: then opening a block is no more than telling the device to fetch it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Thread
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
class _Ahead:
    """Copies of parameters on the CPU, which one thread makes while the caller does something else."""

    def __init__(self, parameters: Iterable[nn.Parameter], pinned: bool) -> None:
        # What a parameter holds now stays in memory as long as this object, so its place tells it apart.
        self._held = {id(one): (one.detach(), one._version) for one in parameters}
        self._copies: dict[int, Tensor] = {}
        self._pinned = pinned
        self._thread = Thread(target=self._copy, name="sparsessm-ahead")
        self._thread.start()

    def _copy(self) -> None:
        try:
            for key, (held, _) in self._held.items():
                self._copies[key] = torch.empty_like(held, pin_memory=self._pinned).copy_(held)
        except RuntimeError:  # no memory: the others are copied when the block is opened
            pass

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """What the parameter holds, if it was copied and not changed since; waits for the thread."""
        self._thread.join()
        copy = self._copies.pop(id(parameter), None)
        if copy is None:
            return None
        held, version = self._held[id(parameter)]
        same = parameter.data_ptr() == held.data_ptr() and parameter._version == version
        return copy if same else None

    def drop(self) -> None:
        """Afterwards the thread has ended."""
        self._thread.join()


@final
class OnDevice(Residence):
    """Of a model that another residence holds."""

    def __init__(self, inner: Residence, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self._open: dict[int, _Open] = {}
        self._ahead: tuple[int, _Ahead] | None = None

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

    def expect(self, block: Layer | None) -> bool:
        self._drop()
        there = self.inner.expect(block)
        if block is not None and there and block.index not in self._open:
            # those that an open block shares are on the device, and may come back as others
            some = [parameter for parameter in block.layer.parameters() if parameter.device != self.device]
            if sum(parameter.nbytes for parameter in some) <= self.inner.spare():
                with torch.inference_mode(False):
                    self._ahead = block.index, _Ahead(some, pinned=self.device.type == "cuda")
        return there

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead[1].drop()
            self._ahead = None

    def _bring(self, here: _Open, block: Layer) -> None:
        ahead = self._ahead[1] if self._ahead is not None and self._ahead[0] == block.index else None
        for parameter in block.layer.parameters():
            values = ahead and ahead.take(parameter)
            values = parameter.detach() if values is None else values
            there = values.to(self.device, non_blocking=ahead is not None)
            twin = nn.Parameter(there, parameter.requires_grad)
            torch.utils.swap_tensors(parameter, twin)
            here.parameters.append((parameter, twin, parameter._version))
        for module in block.layer.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    here.buffers.append((module, name, buffer))
                    module._buffers[name] = buffer.to(self.device)
        if ahead is not None:
            self._drop()

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
