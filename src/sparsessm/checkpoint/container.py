"""The file `packed.safetensors`: encoded tensors out, encoded tensors in, nothing believed.

`docs/sparse-format.md` is the definition. The file is a valid safetensors file; it is read and written here
and not by the library, because every number in the header has to be held against the size of the file before
memory is taken, every fault has to be said by the name of its tensor, nothing may stay mapped, and the same
tensors have to give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.foreign import short
from . import coded, read_ahead, stacked
from .coded import Coded
from .described import MOST_AXES, Form, Format, checksum, described, is_whole
from .encoding import Encoded, bits_of
from .files import few, parse_json
from .packed_tensor import PackedTensor
from .shelf import Unread
from .stacked import Stacked

PACKED = "packed.safetensors"
HEADER_BYTES = 1 << 26
"""Largest header: room for seventy thousand matrices of experts, of which one takes up to a kilobyte."""
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PARTS = {"dense": (), "bitmask": ("mask", "offsets"), "n:m": ("index",)}


@dataclass(frozen=True)
class _Span:
    """An array in the file: `start` is its first byte, from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What the head of a packed file says, checked against itself and the size of the file.

    Attributes:
        format: of the stock checkpoint.
        stock: stock tensor -> (shape, dtype, label of its kind, removed value).
        single: the same of the tensors that have arrays of their own: of a stack its matrices.
        checksums: of each of these the CRC32C of its arrays.
    """

    file: Path
    format: Format
    stock: Mapping[str, Form]
    single: Mapping[str, Form]
    checksums: Mapping[str, str]
    spans: Mapping[str, _Span]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stock tensor -> shape."""
        return {name: shape for name, (shape, *_) in self.stock.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Stock tensor -> bytes of its arrays."""
        return {
            name: sum(
                self.spans[array].nbytes for one in self.singles(name) for array in self.arrays(one).values()
            )
            for name in self.stock
        }

    def singles(self, name: str) -> list[str]:
        """The names in `single` that a stock tensor consists of."""
        shape, _, label, _ = self.stock[name]
        return [f"{name}.{place}" for place in range(shape[0])] if label == stacked.LABEL else [name]

    def arrays(self, name: str) -> dict[str, str]:
        """Part -> name in the file, of a tensor of `single`."""
        return _arrays(name, self.single[name][2], self.spans)


def read_header(file: Path) -> Header:
    """The head of a packed file; no tensor is read.

    Raises:
        ValueError: begins with the file: not readable, truncated, not a safetensors file, not packed by a
            version that is known here, or arrays and descriptions that do not fit each other.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                most = min(max(size - 8, 0), HEADER_BYTES)
                raise ValueError(f"truncated or not safetensors: header of {length} bytes, at most {most}")
            header = parse_json(content.read(length), "the header", strict=True)
        metadata = header.pop("__metadata__", None)
        told = described(metadata)  # first: another version may have other arrays
        spans = _spans(header, 8 + length, size)
        _compare(told.single, spans)
        return Header(file, *told, spans)
    except OSError as error:
        raise ValueError(f"{file}: not readable ({error})") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_tensors(
    header: Header, expected: Mapping[str, tuple[int, ...]], check: bool = True
) -> Iterator[tuple[str, PackedTensor]]:
    """The tensors of a packed file by name, one by one, each in memory of its own.

    Args:
        expected: the shape of each tensor that the model has.
        check: also look at every byte: checksums, and what the arrays stand for (`Encoded.check`); shapes
            and dtypes always are.

    Raises:
        ValueError: begins with the file and names the tensor: missing, unknown, of a shape that the model
            does not have, damaged, or arrays that do not stand for a tensor.
    """
    yield from Tensors(header, expected, check).items()


class Tensors(Unread):
    """The tensors of a packed file by name, each read, checked and given away when it is asked for."""

    def __init__(self, header: Header, expected: Mapping[str, tuple[int, ...]], check: bool = True) -> None:
        """As `read_tensors`; what the head of the file says is held against `expected` here."""
        self._header, self._check = header, check
        self._shapes = dict(expected)
        stock = header.stock
        shapes = [
            f"{name} {list(stock[name][0])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in stock and stock[name][0] != tuple(shape)
        ]
        faults = {
            "missing tensors": [name for name in expected if name not in stock],
            "tensors the model does not have": [repr(name)[1:-1] for name in stock if name not in expected],
            "wrong shapes": shapes,
        }
        if any(faults.values()):
            told = "; ".join(f"{what}: {few(names)}" for what, names in faults.items() if names)
            raise ValueError(f"{header.file}: its tensors do not fit config.json: {told}")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As `Unread.shapes`."""
        return self._shapes

    def __getitem__(self, name: str) -> PackedTensor:
        self.shapes[name]  # a KeyError before the file is touched
        file = self._header.file
        try:
            with open(file, "rb", buffering=0) as content:
                tensor = _read(self._header, name, content, self._check)
            tensor.check(contents=self._check)
            return tensor
        except OSError as error:
            raise ValueError(f"{file}: not readable ({error})") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def soon(self, name: str) -> None:
        """A tensor will be asked for (read_ahead.py)."""
        header = self._header
        arrays = [array for one in header.singles(name) for array in header.arrays(one).values()]
        spans = [header.spans[array] for array in arrays]
        read_ahead.of_file(self._header.file, [(span.start, span.nbytes) for span in spans])


def array_bytes(array: Tensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray(bits_of(array)).reshape(-1).view(np.uint8)


def _spans(header: dict[str, Any], start: int, size: int) -> dict[str, _Span]:
    """The arrays, checked: they cover the rest of the file without a gap, each of the bytes of its shape."""
    spans = {}
    for name, entry in header.items():
        fields = {"dtype", "shape", "data_offsets"}
        if not isinstance(entry, dict) or entry.keys() != fields:
            raise ValueError(f"{name!r}: expected an object of dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in _DTYPES:
            raise ValueError(f"{name!r}: dtype {short(code)}; allowed: {', '.join(_DTYPES)}")
        if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(map(is_whole, shape)):
            allowed = f"at most {MOST_AXES} whole numbers >= 0"
            raise ValueError(f"{name!r}: shape {short(shape)}; allowed: {allowed}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_whole, offsets)):
            raise ValueError(f"{name!r}: data_offsets {short(offsets)}; allowed: two whole numbers >= 0")
        (begin, end), dtype = offsets, _DTYPES[code]
        if not begin <= end <= size - start:
            raise ValueError(f"{name!r}: data_offsets {short(offsets)}; the file ends at {size - start}")
        # The lengths one by one before their product, which may have thousands of digits.
        if any(length > size for length in shape) or prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{name!r}: shape {short(shape)} in {code} is not {end - begin} bytes")
        spans[name] = _Span(dtype, tuple(shape), start + begin, end - begin)
    reached = start
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if span.start != reached:
            raise ValueError(f"{name!r}: begins at byte {span.start}, the array before it ends at {reached}")
        reached += span.nbytes
    if reached != size:
        raise ValueError(f"truncated or longer than it says: {size} bytes, its header describes {reached}")
    return spans


def _compare(single: Mapping[str, Form], spans: Mapping[str, _Span]) -> None:
    """Every array belongs to a tensor, and every tensor has the arrays of its kind."""
    owned: set[str] = set()
    for name, (_, _, label, _) in single.items():
        names = _arrays(name, label, spans)
        if missing := [array for array in names.values() if array not in spans]:
            raise ValueError(f"{name!r} is of kind {label}, but there is no {few(missing)!r}")
        if twice := owned & set(names.values()):
            raise ValueError(f"{name!r}: {min(twice)!r} belongs to another tensor too")
        owned |= set(names.values())
    if stray := [name for name in spans if name not in owned]:
        raise ValueError(f"{stray[0]!r} belongs to no tensor of __metadata__ ({len(stray)} such)")


def _arrays(name: str, label: str, spans: Mapping[str, _Span]) -> dict[str, str]:
    """Part -> name in the file, of a tensor of a kind; int8 is recognised by its scale."""
    scaled = f"{name}.scale" in spans
    if label == "dense" and not scaled:
        return {"values": name}
    if coded.KIND.fullmatch(label):
        return {part: f"{name}.{part}" for part in coded.PARTS[coded.split(label)[0]]}
    kind = "n:m" if ":" in label else label
    parts = ("values", *_PARTS[kind], *(("scale",) if scaled else ()))
    return {part: f"{name}.{part}" for part in parts}


def _read(header: Header, name: str, content: FileIO, check: bool) -> PackedTensor:
    """A stock tensor."""
    shape, dtype, label, _ = header.stock[name]
    if label != stacked.LABEL:
        return _encoded(header, name, content, check)
    each = tuple(_encoded(header, one, content, check) for one in header.singles(name))
    return Stacked(name, shape, dtype, each)


def _encoded(header: Header, name: str, content: FileIO, check: bool) -> PackedTensor:
    """A tensor of `single`."""
    shape, dtype, label, removed = header.single[name]
    arrays: dict[str, Any] = {}
    memories = []
    for part, array in header.arrays(name).items():
        span = header.spans[array]
        memory = torch.empty(span.nbytes, dtype=torch.uint8)
        content.seek(span.start)
        if not _filled(memory.numpy().data, content):
            raise ValueError(f"{name}: the file ended inside {array!r}")
        memories.append(memory.numpy())
        arrays[part] = memory.view(span.dtype).reshape(span.shape)
    if check and (found := checksum(memories)) != header.checksums[name]:
        told = f"its checksum is {found}, the file says {header.checksums[name]}"
        raise ValueError(f"tensor {name} is damaged: {told}")
    if coded.KIND.fullmatch(label):
        return Coded(name, shape, dtype, *coded.split(label), arrays)
    n, m = map(int, label.split(":")) if ":" in label else (0, 0)
    return Encoded(name, shape, dtype, "n:m" if m else label, removed=removed, n=n, m=m, **arrays)


def _filled(memory: memoryview, content: FileIO) -> bool:
    """Read so many bytes; False if the file has fewer. One call of the system reads 2 GiB at most."""
    while len(memory):
        count = content.readinto(memory)
        if not count:
            return False
        memory = memory[count:]
    return True
