"""The file `packed.safetensors`: encoded tensors out, encoded tensors in, nothing believed.

`docs/sparse-format.md` is the definition. The file is a valid safetensors file; it is read and written here
and not by the library, because every number in the header has to be held against the size of the file before
memory is taken, every fault has to be said by the name of its tensor, nothing may stay mapped, and the same
tensors have to give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.foreign import short
from ..kernels.checksum import crc32c
from . import coded, read_ahead
from .coded import Coded
from .encoding import Encoded, bits_of
from .files import few, parse_json
from .packed_tensor import STOCK, PackedTensor
from .shelf import Unread

PACKED = "packed.safetensors"
PACKING = "sparsessm-packed"
FORMATS = ("transformers", "state-spaces")
Format = Literal["transformers", "state-spaces"]
"""Of a stock checkpoint: whose names its `config.json` and tensors have. In the head it is called layout."""

HEADER_BYTES = 1 << 24
"""Largest header: room for a hundred thousand tensors."""
MOST_AXES = 8
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
NAMES = {dtype: name for name, dtype in STOCK.items()}
_CHECKSUM = re.compile(r"[0-9a-f]{8}", re.ASCII)
_PLAIN, _PLAIN_WORDS = r"dense|bitmask|[1-9]\d{0,2}:[1-9]\d{0,2}", "'dense', 'bitmask', 'N:M'"
_KINDS = {  # of a version, each with all of those before it
    "1": (re.compile(_PLAIN, re.ASCII), _PLAIN_WORDS),
    "2": (re.compile(f"{_PLAIN}|{coded.OLDER.pattern}", re.ASCII), f"{_PLAIN_WORDS}, {coded.OLDER_WORDS}"),
    "3": (re.compile(f"{_PLAIN}|{coded.KIND.pattern}", re.ASCII), f"{_PLAIN_WORDS}, {coded.WORDS}"),
}
VERSIONS = tuple(_KINDS)
"""The second has coded tensors, the third entropy coded ones."""
_Stock = tuple[tuple[int, ...], torch.dtype, str, float]  # shape, dtype, label of the kind, removed value
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
        checksums: stock tensor -> CRC32C of its arrays.
    """

    file: Path
    format: Format
    stock: Mapping[str, _Stock]
    spans: Mapping[str, _Span]
    checksums: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stock tensor -> shape."""
        return {name: shape for name, (shape, *_) in self.stock.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Stock tensor -> bytes of its arrays."""
        sizes = dict.fromkeys(self.stock, 0)
        for array, span in self.spans.items():
            sizes[array if array in sizes else array.rpartition(".")[0]] += span.nbytes
        return sizes

    def arrays(self, name: str) -> dict[str, str]:
        """Part -> name in the file, of a stock tensor."""
        return _arrays(name, self.stock[name][2], self.spans)


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
        format, stock, checksums = _metadata(metadata)  # first: another version may have other arrays
        spans = _spans(header, 8 + length, size)
        _compare(stock, spans)
        return Header(file, format, stock, spans, checksums)
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
                tensor = _encoded(self._header, name, content, self._check)
            tensor.check(contents=self._check)
            return tensor
        except OSError as error:
            raise ValueError(f"{file}: not readable ({error})") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def soon(self, name: str) -> None:
        """A tensor will be asked for (read_ahead.py)."""
        spans = [self._header.spans[array] for array in self._header.arrays(name).values()]
        read_ahead.of_file(self._header.file, [(span.start, span.nbytes) for span in spans])


def checksum(parts: Iterable[bytes | NDArray[np.uint8]]) -> str:
    """CRC32C of bytes that follow each other, in 8 hexadecimal digits."""
    total = 0
    for part in parts:
        if len(part):  # of nothing NumPy makes no array
            total = crc32c(np.frombuffer(part, np.uint8), total)
    return f"{total:08x}"


def array_bytes(array: Tensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray(bits_of(array)).reshape(-1).view(np.uint8)


def version_of(labels: Iterable[str]) -> str:
    """The version of a file whose tensors are of these kinds: the first that has them all."""
    labels = list(labels)
    return next(one for one, (kinds, _) in _KINDS.items() if all(map(kinds.fullmatch, labels)))


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


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
        if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(map(_whole, shape)):
            allowed = f"at most {MOST_AXES} whole numbers >= 0"
            raise ValueError(f"{name!r}: shape {short(shape)}; allowed: {allowed}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
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


def _metadata(metadata: Any) -> tuple[Format, dict[str, _Stock], dict[str, str]]:
    """(format, description and checksum of each stock tensor) of a `__metadata__`, in allowed forms."""
    if not isinstance(metadata, dict) or metadata.get("format") != PACKING:
        raise ValueError(f"not a packed checkpoint: its __metadata__ does not say format {PACKING!r}")
    if (version := metadata.get("version")) not in VERSIONS:
        raise ValueError(f"version {short(version)} of the format; known: {', '.join(map(repr, VERSIONS))}")
    if metadata.keys() != {"format", "version", "layout", "tensors", "checksum"}:
        raise ValueError(
            "__metadata__ must have format, version, layout, tensors and checksum, and nothing else"
        )
    format, text = metadata["layout"], metadata["tensors"]
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"layout {short(format)}; allowed: {', '.join(FORMATS)}")
    if not isinstance(text, str):
        raise ValueError("__metadata__ tensors must be a string that holds a JSON object")
    if (found := checksum([text.encode("utf-8", "surrogatepass")])) != metadata["checksum"]:
        told = f"its checksum is {found}, the file says {short(metadata['checksum'])}"
        raise ValueError(f"the header is damaged: {told} of __metadata__ tensors")
    stock, checksums = {}, {}
    for name, entry in parse_json(text, "__metadata__ tensors", strict=True).items():
        needed = {"shape", "dtype", "kind", "checksum"}
        if not isinstance(entry, dict) or not needed <= entry.keys() <= needed | {"fill"}:
            raise ValueError(
                f"{name!r}: expected an object of shape, dtype, kind, checksum and, if need be, fill"
            )
        if not isinstance(entry["checksum"], str) or not _CHECKSUM.fullmatch(entry["checksum"]):
            allowed = "8 hexadecimal digits"
            raise ValueError(f"{name!r}: checksum {short(entry['checksum'])}; allowed: {allowed}")
        shape, dtype, kind = entry["shape"], entry["dtype"], entry["kind"]
        removed = entry.get("fill", 0.0)
        if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(map(_whole, shape)):
            allowed = f"at most {MOST_AXES} whole numbers"
            raise ValueError(f"{name!r}: shape {short(shape)}; allowed: {allowed}")
        if not isinstance(dtype, str) or dtype not in STOCK:
            raise ValueError(f"{name!r}: dtype {short(dtype)}; allowed: {', '.join(STOCK)}")
        pattern, allowed = _KINDS[version]
        if not isinstance(kind, str) or not pattern.fullmatch(kind):
            raise ValueError(f"{name!r}: kind {short(kind)}; allowed: {allowed}")
        if "fill" in entry and coded.KIND.fullmatch(kind):
            raise ValueError(f"{name!r}: kind {kind} has no fill")
        if type(removed) not in (int, float) or abs(removed) > 1e39:
            raise ValueError(f"{name!r}: fill {short(removed)}; allowed: a finite number of its dtype")
        stock[name] = tuple(shape), STOCK[dtype], kind, float(removed)
        checksums[name] = entry["checksum"]
    return cast(Format, format), stock, checksums


def _compare(stock: Mapping[str, _Stock], spans: Mapping[str, _Span]) -> None:
    """Every array belongs to a stock tensor, and every stock tensor has the arrays of its kind."""
    owned: set[str] = set()
    for name, (_, _, label, _) in stock.items():
        names = _arrays(name, label, spans)
        if missing := [array for array in names.values() if array not in spans]:
            raise ValueError(f"{name!r} is of kind {label}, but there is no {few(missing)!r}")
        if twice := owned & set(names.values()):
            raise ValueError(f"{name!r}: {min(twice)!r} belongs to another tensor too")
        owned |= set(names.values())
    if stray := [name for name in spans if name not in owned]:
        raise ValueError(f"{stray[0]!r} belongs to no tensor of __metadata__ ({len(stray)} such)")


def _arrays(name: str, label: str, spans: Mapping[str, _Span]) -> dict[str, str]:
    """Part -> name in the file, of a stock tensor of a kind; int8 is recognised by its scale."""
    scaled = f"{name}.scale" in spans
    if label == "dense" and not scaled:
        return {"values": name}
    if coded.KIND.fullmatch(label):
        return {part: f"{name}.{part}" for part in coded.PARTS[coded.split(label)[0]]}
    kind = "n:m" if ":" in label else label
    parts = ("values", *_PARTS[kind], *(("scale",) if scaled else ()))
    return {part: f"{name}.{part}" for part in parts}


def _encoded(header: Header, name: str, content: FileIO, check: bool) -> PackedTensor:
    shape, dtype, label, removed = header.stock[name]
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
