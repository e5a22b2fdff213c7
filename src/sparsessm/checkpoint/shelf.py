"""Stock files whose tensors are taken one by one, in any order, and the form the runtime takes them in.

For whoever needs each tensor once and not the whole model: what was taken is given back as soon as it is
dropped, and so is the part of the file that was mapped for it.
"""

from __future__ import annotations

import ctypes
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import read_ahead
from .encoding import Encoded, encode
from .files import MAPPED, open_safetensors, read_bin, spans
from .packed_tensor import PackedTensor
from .stock_names import joined
from .tensor_file import Form


class Shelf:
    """The tensors of a checkpoint directory, by their names in the files."""

    def __init__(self, names: Mapping[Path, Iterable[str]], *, safetensors: bool) -> None:
        """Of files whose heads were read.

        Args:
            names: of the tensors in each file. safetensors: whether that is their kind, else `.bin`.

        Raises:
            ValueError: one of the files has gone.
        """
        self._safetensors = safetensors
        self._files = {name: file for file, some in names.items() for name in some}
        self._states = {file: _state(file) for file in names}
        self._open: Path | None = None
        self._content: dict[str, Tensor] = {}
        self._used = 0
        self._spans: dict[Path, dict[str, tuple[int, int]]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A tensor as it is stored, which may be mapped: the file must not be changed while it is used.

        Raises:
            ValueError: the file was changed since the shelf was made, or is not readable any more.
        """
        file = self._files[name]
        if _state(file) != self._states[file]:
            raise ValueError(f"{file}: it was changed while it was read")
        if self._safetensors:
            with open_safetensors(file) as content:
                return content.get_tensor(name)
        if self._open != file or self._used > MAPPED:
            self._open, self._content = None, {}  # first: two of them would be in memory together
            self._content, self._open, self._used = dict(read_bin(file)), file, 0
        tensor = self._content[name]
        if zipfile.is_zipfile(file):  # others are in memory as a whole, as long as they are read
            self._used += tensor.nbytes
        return tensor

    def soon(self, name: str) -> None:
        """A tensor will be asked for (read_ahead.py); nothing is read that would take memory."""
        file = self._files[name]
        with suppress(ValueError, OSError):  # who asks for it is told
            if not self._safetensors:
                if zipfile.is_zipfile(file):
                    read_ahead.of_mapped(self[name])
            elif _state(file) == self._states[file]:
                if file not in self._spans:
                    self._spans[file] = spans(file)
                read_ahead.of_file(file, [self._spans[file][name]])


class Unread(Mapping[str, PackedTensor]):
    """Encoded tensors by name, each read when it is asked for and not kept; their shapes are known before."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each tensor, by name; none is read for it."""

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(tensors: Mapping[str, PackedTensor]) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor, by name; none is read for it."""
    if isinstance(tensors, Unread):
        return tensors.shapes
    return {name: tensor.shape for name, tensor in tensors.items()}


class Stored(Unread):
    """The tensors of a stock checkpoint by their names in the model, each dense in its stored dtype.

    None is kept: each is read, joined of its parts and encoded when it is asked for, and must be dropped
    before the files change.
    """

    def __init__(
        self,
        shelf: Shelf,
        model: PreTrainedModel,
        parts: Mapping[str, Mapping[str, str]],
        stored: Mapping[str, torch.dtype],
    ) -> None:
        """Of a checkpoint that was checked.

        Args:
            model: without memory for its weights.
            parts: name in the model -> name in full of each part in the files -> its name there.
            stored: the dtype of each tensor, by its name in the model.
        """
        self._shelf, self._model, self._parts, self._stored = shelf, model, parts, stored
        tensors = model.state_dict()
        self._shapes = {name: tuple(tensors[name].shape) for name in parts}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As `Unread.shapes`."""
        return self._shapes

    def __getitem__(self, name: str) -> Encoded:
        parts, form = self._parts[name], Form(self._stored[name], self._shapes[name])
        whole = joined(self._model, name, form, parts, lambda part: self._shelf[parts[part]])
        return encode(name, whole, kind="dense")

    def soon(self, name: str) -> None:
        """A tensor will be asked for."""
        for part in self._parts[name].values():
            self._shelf.soon(part)


@final
class Later(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and not kept."""

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]) -> None:
        self._reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def give_back() -> None:
    """Let the system have the pages that were freed and that glibc keeps; elsewhere nothing happens."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another libc; Windows, which has no program to look into
        return
    trim(0)


def _state(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: not readable ({error})") from error
    return found.st_size, found.st_mtime_ns, found.st_ino
