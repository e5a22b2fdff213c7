"""The file `packed.safetensors` is laid out, then written: the same tensors always give the same bytes.

Beside `container.py`, which reads it and knows what its header says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .container import CODES, HEADER_BYTES, PACKED, array_bytes
from .described import NAMES, PACKING, Format, checksum, version_of
from .packed_tensor import PackedTensor
from .stacked import Stacked


@dataclass(frozen=True)
class Outline:
    """How tensors lie in a packed file, known before it is written.

    Attributes:
        head: the file up to its first array.
        starts: where each array begins in the file, by its name there.
        forms: stock tensor -> in two words how it is stored: label of its kind, what its arrays hold.
        sizes: stock tensor -> bytes of its arrays.
    """

    head: bytes
    starts: Mapping[str, int]
    forms: Mapping[str, tuple[str, str]]
    sizes: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(self.sizes.values())


def outline(format: Format, tensors: Mapping[str, PackedTensor]) -> Outline:
    """How `write` stores tensors.

    Args:
        tensors: each is asked for once, and not kept.

    Raises:
        ValueError: too many of them.
    """
    described = {}
    forms: dict[str, tuple[str, str]] = {}
    sizes: dict[str, int] = {}
    arrays: dict[str, tuple[torch.dtype, list[int], int]] = {}
    for name, tensor in tensors.items():
        entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": NAMES[tensor.dtype]}
        if isinstance(tensor, Stacked):
            described[name] = entry | {"kind": tensor.label, "each": [_told(one) for one in tensor.each]}
        else:
            described[name] = entry | _told(tensor)
        forms[name], sizes[name] = (tensor.label, tensor.held), tensor.nbytes
        for part, array in tensor.parts.items():
            arrays[part] = array.dtype, list(array.shape), array.nbytes
        del tensor  # before the next one is made
    # Wide elements first, as the library does: every array then begins at a multiple of its element size.
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1][0].itemsize))
    text = json.dumps(described)
    version = version_of(label for label, _ in forms.values())
    metadata = {"format": PACKING, "version": version, "layout": format, "tensors": text}
    metadata["checksum"] = checksum([text.encode()])
    header: dict[str, Any] = {"__metadata__": metadata}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape, nbytes) in arrays.items():
        starts[name], end = end, end + nbytes
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [starts[name], end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > HEADER_BYTES:
        raise ValueError(f"{PACKED}: a header of {len(head)} bytes; at most {HEADER_BYTES}")
    head = len(head).to_bytes(8, "little") + head
    return Outline(head, {name: len(head) + start for name, start in starts.items()}, forms, sizes)


def _told(tensor: PackedTensor) -> dict[str, Any]:
    """What the head of a file says of a tensor beside its form."""
    fill = {} if tensor.fill is None else {"fill": tensor.fill}
    return {"kind": tensor.label, **fill, "checksum": checksum(map(array_bytes, tensor.parts.values()))}


def write(
    file: Path, format: Format, tensors: Mapping[str, PackedTensor], found: Outline | None = None
) -> None:
    """Write a packed file; the same tensors in the same order always give the same bytes.

    Args:
        tensors: each is asked for twice, and not kept.
        found: their outline, if it was made before; each is then asked for once.

    Raises:
        ValueError: as `outline`.
        OSError: as the file system reports it.
    """
    found = found or outline(format, tensors)
    with open(file, "wb") as content:
        content.write(found.head)
        for tensor in tensors.values():
            for name, array in tensor.parts.items():
                content.seek(found.starts[name])
                content.write(array_bytes(array).data)
            del tensor  # before the next one is made
