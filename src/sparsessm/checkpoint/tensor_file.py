"""One safetensors file, written tensor by tensor: first its head, then the bytes, one in memory at a time.

The library takes all tensors of a file at once. This file is to the byte what it writes of the same tensors:
same order, same head. Knows nothing of models; `files.py` splits a checkpoint into such files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# In the order of the library, which writes the last of these first: no array then needs padding before it.
_ORDER = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
_PLACE = {name: place for place, name in enumerate(_ORDER)}


class Form(NamedTuple):
    """Of a tensor, all but its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """That of a tensor, which may be on `meta`."""
        return cls(tensor.dtype, tuple(tensor.shape))


def write(
    file: Path, forms: Mapping[str, Form], tensor: Callable[[str], Tensor], notes: Mapping[str, str]
) -> None:
    """Write a safetensors file.

    Args:
        forms: of its tensors, by name.
        tensor: the tensor of a name, of the form that was said; asked for once each, in the order of `forms`.
        notes: text beside the tensors.

    Raises:
        ValueError: names a tensor of a dtype that the format does not have, or of another form than was said.
        OSError: as the file system reports it.
    """
    head, starts = _head(forms, notes)
    with open(file, "wb") as content:
        content.write(head)
        for name, form in forms.items():
            value = tensor(name)
            if (found := Form.of(value)) != form:
                raise ValueError(f"{name}: it is {found}, not {form}")
            content.seek(len(head) + starts[name])  # the order asked for is not that in the file
            content.write(raw(value))
            del value  # before the next one is made


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, its own memory where that is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _head(forms: Mapping[str, Form], notes: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file up to its first tensor; and where each begins behind that, by name."""
    for name, form in forms.items():
        if _word(form.dtype) not in _ORDER:
            allowed = ", ".join(_ORDER)
            raise ValueError(f"{name}: its dtype is {_word(form.dtype)}; safetensors can hold {allowed}")
    header: dict[str, object] = {"__metadata__": dict(notes)} if notes else {}
    starts: dict[str, int] = {}
    end = 0
    for name, form in sorted(forms.items(), key=lambda item: (-_PLACE[_word(item[1].dtype)], item[0])):
        starts[name], end = end, end + form.nbytes
        offsets = [starts[name], end]
        header[name] = {
            "dtype": _ORDER[_word(form.dtype)],
            "shape": list(form.shape),
            "data_offsets": offsets,
        }
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head, starts


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
