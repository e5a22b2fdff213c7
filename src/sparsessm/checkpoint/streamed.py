"""Models whose blocks lie on a disk: the weights of a block are in memory while it is open, and no others.

Beside `assembly.py`, which puts a whole model into memory. A closed parameter is a NaN seen at every place
of its shape (stride 0), so that whoever computes with it unopened is found out and nothing takes memory.
Embedding, head, norms outside of layers and what blocks share stay in memory. A block that was changed is
written into a working directory when it is closed, and read from there from then on.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..architectures import InMemory, Residence
from ..architectures.ranks import here
from ..architectures.residence import KEEPING, SHARE, Layer
from . import read_ahead
from .files import open_safetensors, spans, write_one
from .mapped import Mapped
from .shelf import give_back

EXACT = (torch.bfloat16, torch.float16, torch.float32)
"""Tried in this order for a tensor of a changed block: the first that holds all its values."""
_NAN = torch.full((), math.nan)


class Source(ABC):
    """What has the values of a closed parameter."""

    @abstractmethod
    def read(self) -> Tensor:
        """They, a new float32 tensor.

        Raises:
            ValueError: they cannot be read any more.
        """

    @abstractmethod
    def soon(self) -> None:
        """They will be read; what can be done for it without memory is done now."""


class _Home(NamedTuple):
    """Where the values of a closed parameter are."""

    parameter: nn.Parameter
    source: Source


@dataclass
class _Open:
    """A block in memory.

    Attributes:
        times: opened and not closed again. homes: of what was read for it. versions: torch's count of
            changes in place of each of its parameters then, by identity.
    """

    times: int
    homes: list[_Home]
    versions: dict[int, int] = field(default_factory=dict)


@final
class Streamed(Residence):
    """Parameters of single blocks come and go; all others stay.

    Attributes:
        folder: the working directory, whose `NNNNN.safetensors` are the changed blocks.
        mapped: hidden states that are in files.
    """

    def __init__(
        self,
        homes: Mapping[nn.Parameter, Source],
        staying: Iterable[nn.Parameter],
        folder: Path | None = None,
        *,
        keep: bool = False,
        limit: int = 1 << 28,
        beside: Path | None = None,
    ) -> None:
        """
        Args:
            homes: the parameters that come and go, with what has their values. staying: all others.
            folder: the working directory; None: a temporary one, which goes with this object.
            keep: what was read stays in memory, as there is enough.
            limit: bytes of hidden states that one tensor may have in memory; larger ones are in a file.
            beside: where a temporary working directory is made; None: where the system has them.
        """
        self._homes = {id(parameter): _Home(parameter, source) for parameter, source in homes.items()}
        self._staying = {id(parameter): parameter for parameter in staying}
        self._open: dict[int, _Open] = {}
        self._keep, self._limit, self._given, self._beside = keep, limit, folder, beside
        self._writes = folder is None or here().first  # what all read, one writes
        self._temporary: Path | None = None
        self.mapped = Mapped()
        self._written: set[int] = set()
        for parameter in homes:
            _empty(parameter)

    @property
    def folder(self) -> Path:
        if self._given is not None:
            return self._given
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="sparsessm-", dir=self._beside))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return self._temporary

    def open(self, block: Layer) -> None:
        if block.index in self._open:
            self._open[block.index].times += 1
            return
        parameters = list(block.layer.parameters())
        homes = [self._homes[id(parameter)] for parameter in parameters if id(parameter) in self._homes]
        with torch.inference_mode(False):
            for home in homes:
                if _is_empty(home.parameter):
                    home.parameter.data = home.source.read()
        versions = {id(parameter): parameter._version for parameter in parameters}
        self._open[block.index] = _Open(1, homes, versions)

    def expect(self, block: Layer | None) -> bool:
        closed = [home for home in self._of(block) if _is_empty(home.parameter)] if block else []
        for home in closed:
            home.source.soon()
        return not closed

    def close(self, block: Layer) -> None:
        was = self._open[block.index]
        was.times -= 1
        if was.times:
            return
        try:
            parameters = block.layer.parameters()
            if any(was.versions.get(id(parameter)) != parameter._version for parameter in parameters):
                self._keep_changes(block)
        finally:
            del self._open[block.index]
            if not self._keep:
                for home in (*was.homes, *self._of(block)):  # those of a layer that was replaced too
                    _empty(home.parameter)
                give_back()

    def adopt(self, block: Layer) -> None:
        """What an earlier run in the same working directory made of a block; it has these shapes already.

        Raises:
            ValueError: the file is not there, or is of other tensors.
        """
        file = self.file(block)
        for name, parameter in block.layer.named_parameters():
            source = _Kept(file, name, tuple(parameter.shape))
            if id(parameter) in self._staying:
                with torch.no_grad():
                    parameter.copy_(source.read())
            else:
                self._homes[id(parameter)] = _Home(parameter, source)
                _empty(parameter)
        self._written.add(block.index)

    def file(self, block: Layer) -> Path:
        """Where a block is kept that was changed."""
        return self.folder / f"{block.index:05d}.safetensors"

    def changed(self, block: Layer) -> bool:
        """Whether the block is kept there."""
        return block.index in self._written

    def value(self, parameter: Tensor) -> Tensor:
        home = self._homes.get(id(parameter))
        if home is None or not _is_empty(home.parameter):
            return parameter.detach()
        return home.source.read()

    def expect_value(self, parameter: Tensor) -> None:
        """`value` will be asked for it."""
        home = self._homes.get(id(parameter))
        if home is not None and _is_empty(home.parameter):
            home.source.soon()

    def room(self, like: Tensor, *shape: int) -> Tensor:
        if self.stays(4 * math.prod(shape)) or like.device.type != "cpu" or like.dtype != torch.float32:
            return like.new_empty(shape)
        return self.mapped.tensor(self.folder, shape)

    def release(self, states: Tensor) -> None:
        if not self.stays(states.nbytes):
            self.mapped.release(states)

    def at_once(self, nbytes: int, most: int, *, free: int) -> int:
        return free if self._keep else max(1, min(most, 2 * self._limit // nbytes))

    def spare(self) -> int:
        return SHARE * self._limit // KEEPING

    def stays(self, nbytes: int) -> bool:
        return nbytes <= self._limit

    def copied(self, model: nn.Module) -> tuple[Any, Residence]:
        if self._keep:
            return copy.deepcopy(model), InMemory(SHARE * self._limit)
        memo: dict[int, Any] = {}
        homes: dict[nn.Parameter, Source] = {}
        for home in self._homes.values():
            other = nn.Parameter(nowhere(tuple(home.parameter.shape)), home.parameter.requires_grad)
            memo[id(home.parameter)], homes[other] = other, _Original(self, home.parameter)
        copied = copy.deepcopy(model, memo)
        staying = [parameter for parameter in copied.parameters() if parameter not in homes]
        return copied, Streamed(homes, staying, limit=self._limit, beside=self.folder)

    def _of(self, block: Layer) -> Iterable[_Home]:
        return [self._homes[id(p)] for p in block.layer.parameters() if id(p) in self._homes]

    def _keep_changes(self, block: Layer) -> None:
        """Write all of a block, what it shares with others too; what is new in it comes and goes now."""
        named = dict(block.layer.named_parameters())
        file = self.file(block)
        if self._writes:
            write_one(file, {name: _exact(parameter.detach()) for name, parameter in named.items()}, {})
        self._written.add(block.index)
        for name, parameter in named.items():
            if id(parameter) not in self._staying:
                self._homes[id(parameter)] = _Home(parameter, _Kept(file, name, tuple(parameter.shape)))


@final
class _Kept(Source):
    """A tensor of a block that was changed, in the block's file."""

    def __init__(self, file: Path, name: str, shape: tuple[int, ...]) -> None:
        self._file, self._name, self._shape = file, name, shape

    def read(self) -> Tensor:
        with open_safetensors(self._file) as content:
            found = content.get_tensor(self._name)
        if tuple(found.shape) != self._shape:
            told = f"{self._name} has shape {tuple(found.shape)}, expected {self._shape}"
            raise ValueError(f"{self._file}: {told}")
        return found.to(torch.float32, copy=True)

    def soon(self) -> None:
        with suppress(ValueError, OSError):
            read_ahead.of_file(self._file, [spans(self._file)[self._name]])


@final
class _Original(Source):
    """A parameter of the model that another one is a copy of."""

    def __init__(self, residence: Streamed, parameter: nn.Parameter) -> None:
        self._residence, self._parameter = residence, parameter

    def read(self) -> Tensor:
        return self._residence.value(self._parameter)

    def soon(self) -> None:
        self._residence.expect_value(self._parameter)


def nowhere(shape: tuple[int, ...]) -> Tensor:
    """What a closed parameter of this shape holds."""
    with torch.inference_mode(False):
        return _NAN.expand(shape)


def _empty(parameter: nn.Parameter) -> None:
    parameter.data = nowhere(tuple(parameter.shape))


def _is_empty(parameter: Tensor) -> bool:
    return parameter.untyped_storage().data_ptr() == _NAN.untyped_storage().data_ptr()


def _exact(values: Tensor) -> Tensor:
    """The same values in the first dtype that has them all."""
    for dtype in EXACT:
        held = values.to(dtype)
        if torch.equal(held.float(), values):
            return held.contiguous()
    return values.contiguous()
