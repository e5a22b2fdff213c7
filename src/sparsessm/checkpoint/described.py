"""What the head of a packed file says of its tensors: kinds and versions, and which words are allowed.

Beside `container.py`, which holds it against the arrays; `docs/sparse-format.md` is the definition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.foreign import short
from ..kernels.checksum import crc32c
from . import coded, stacked
from .files import parse_json
from .packed_tensor import STOCK

PACKING = "sparsessm-packed"
FORMATS = ("transformers", "state-spaces")
Format = Literal["transformers", "state-spaces"]
"""Of a stock checkpoint: whose names its `config.json` and tensors have. In the head it is called layout."""

MOST_AXES = 8
NAMES = {dtype: name for name, dtype in STOCK.items()}
_CHECKSUM = re.compile(r"[0-9a-f]{8}", re.ASCII)
_PLAIN, _PLAIN_WORDS = r"dense|bitmask|[1-9]\d{0,2}:[1-9]\d{0,2}", "'dense', 'bitmask', 'N:M'"
_KINDS = {  # of a version, each with all of those before it
    "1": (re.compile(_PLAIN, re.ASCII), _PLAIN_WORDS),
    "2": (re.compile(f"{_PLAIN}|{coded.OLDER.pattern}", re.ASCII), f"{_PLAIN_WORDS}, {coded.OLDER_WORDS}"),
    "3": (re.compile(f"{_PLAIN}|{coded.KIND.pattern}", re.ASCII), f"{_PLAIN_WORDS}, {coded.WORDS}"),
    "4": (
        re.compile(f"{_PLAIN}|{coded.KIND.pattern}|{stacked.LABEL}", re.ASCII),
        f"{_PLAIN_WORDS}, {coded.WORDS}, '{stacked.LABEL}'",
    ),
}
VERSIONS = tuple(_KINDS)
"""The second has coded tensors, the third entropy coded ones, the fourth tensors of several matrices."""
_OLDER = VERSIONS[:-1]  # that have no stacks; the matrices of a stack have the kinds of the last of them
Form = tuple[tuple[int, ...], torch.dtype, str, float]
"""Shape, dtype, label of the kind, removed value."""


def checksum(parts: Iterable[bytes | NDArray[np.uint8]]) -> str:
    """CRC32C of bytes that follow each other, in 8 hexadecimal digits."""
    total = 0
    for part in parts:
        if len(part):  # of nothing NumPy makes no array
            total = crc32c(np.frombuffer(part, np.uint8), total)
    return f"{total:08x}"


def version_of(labels: Iterable[str]) -> str:
    """The version of a file whose tensors are of these kinds: the first that has them all."""
    labels = list(labels)
    return next(one for one, (kinds, _) in _KINDS.items() if all(map(kinds.fullmatch, labels)))


def is_whole(value: Any) -> bool:
    """A whole number, not below 0."""
    return type(value) is int and value >= 0


class Described(NamedTuple):
    """A `__metadata__` in allowed forms.

    Attributes:
        format: of the stock checkpoint. stock: by name of a stock tensor.
        single: of the tensors that have arrays of their own: of a stack its matrices.
        checksums: of each of these.
    """

    format: Format
    stock: Mapping[str, Form]
    single: Mapping[str, Form]
    checksums: Mapping[str, str]


def described(metadata: Any) -> Described:
    """A `__metadata__`, checked.

    Raises:
        ValueError: names the tensor, says what was found and what is allowed.
    """
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
    stock, single, checksums = {}, {}, {}
    for name, entry in parse_json(text, "__metadata__ tensors", strict=True).items():
        is_stack = isinstance(entry, dict) and entry.get("kind") == stacked.LABEL and version not in _OLDER
        form, each = _stack(name, entry) if is_stack else (None, {name: entry})
        for one, told in each.items():
            if one in single:
                raise ValueError(f"{one!r} is there twice: by itself, and as a matrix of a stack")
            single[one], checksums[one] = _single(one, told, _OLDER[-1] if is_stack else version)
        stock[name] = form or single[name]
    return Described(cast(Format, format), stock, single, checksums)


def _stack(name: str, entry: dict[str, Any]) -> tuple[Form, dict[str, Any]]:
    """A stack, checked, and its matrices, described as tensors, which are yet to be checked."""
    if entry.keys() != {"shape", "dtype", "kind", "each"}:
        raise ValueError(f"{name!r}: expected an object of shape, dtype, kind and each")
    shape, dtype = _form(name, entry)
    if len(shape) != stacked.AXES:
        raise ValueError(f"{name!r}: shape {short(list(shape))}; allowed: {stacked.AXES} axes for a stack")
    each = entry["each"]
    if not isinstance(each, list) or len(each) != shape[0]:
        raise ValueError(f"{name!r}: each {short(each)}; allowed: a list of {shape[0]} objects")
    form = {"shape": list(shape[1:]), "dtype": entry["dtype"]}
    if not all(isinstance(one, dict) and not one.keys() & form.keys() for one in each):
        raise ValueError(f"{name!r}: each holds objects of kind, checksum and, if need be, fill")
    told = {f"{name}.{place}": one | form for place, one in enumerate(each)}
    return (shape, dtype, stacked.LABEL, 0.0), told


def _single(name: str, entry: Any, version: str) -> tuple[Form, str]:
    """A tensor as its arrays must be, and their checksum."""
    needed = {"shape", "dtype", "kind", "checksum"}
    if not isinstance(entry, dict) or not needed <= entry.keys() <= needed | {"fill"}:
        raise ValueError(
            f"{name!r}: expected an object of shape, dtype, kind, checksum and, if need be, fill"
        )
    if not isinstance(entry["checksum"], str) or not _CHECKSUM.fullmatch(entry["checksum"]):
        allowed = "8 hexadecimal digits"
        raise ValueError(f"{name!r}: checksum {short(entry['checksum'])}; allowed: {allowed}")
    shape, dtype = _form(name, entry)
    kind, removed = entry["kind"], entry.get("fill", 0.0)
    pattern, allowed = _KINDS[version]
    if not isinstance(kind, str) or not pattern.fullmatch(kind):
        raise ValueError(f"{name!r}: kind {short(kind)}; allowed: {allowed}")
    if "fill" in entry and coded.KIND.fullmatch(kind):
        raise ValueError(f"{name!r}: kind {kind} has no fill")
    if type(removed) not in (int, float) or abs(removed) > 1e39:
        raise ValueError(f"{name!r}: fill {short(removed)}; allowed: a finite number of its dtype")
    return (shape, dtype, kind, float(removed)), entry["checksum"]


def _form(name: str, entry: dict[str, Any]) -> tuple[tuple[int, ...], torch.dtype]:
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(map(is_whole, shape)):
        allowed = f"at most {MOST_AXES} whole numbers"
        raise ValueError(f"{name!r}: shape {short(shape)}; allowed: {allowed}")
    if not isinstance(dtype, str) or dtype not in STOCK:
        raise ValueError(f"{name!r}: dtype {short(dtype)}; allowed: {', '.join(STOCK)}")
    return tuple(shape), STOCK[dtype]
