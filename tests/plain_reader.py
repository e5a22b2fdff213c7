"""A reader of packed files in plain Python, written from docs/sparse-format.md alone, one entry at a time.

It shares no line with the package and uses neither torch, numpy nor safetensors.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "I64": 8}
PARTS = ("values", "mask", "offsets", "index", "scale")
CODES = {"F32": "<f", "F16": "<e", "I8": "<b", "U8": "<B", "I64": "<q"}


def read(file: Path) -> dict[str, tuple[list[int], str, list[float]]]:
    """Stock tensor -> (shape, dtype, entries row by row); those of int8 in float32, not rounded further."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["version"]) == ("sparsessm-packed", "1")
    assert crc32c(metadata["tensors"].encode()) == metadata["checksum"], "the header is damaged"
    described = json.loads(metadata["tensors"])
    arrays, raw = {}, {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        raw[name] = content[begin:end]
        arrays[name] = numbers(raw[name], entry["dtype"])
    for name, entry in described.items():
        parts = (name, *(f"{name}.{part}" for part in PARTS))
        assert crc32c(b"".join(raw.get(part, b"") for part in parts)) == entry["checksum"], name
    return {
        name: (entry["shape"], entry["dtype"], tensor(name, entry, arrays))
        for name, entry in described.items()
    }


def crc32c(content: bytes) -> str:
    rest = 0xFFFFFFFF
    for byte in content:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ 0x82F63B78 * (rest & 1)
    return f"{rest ^ 0xFFFFFFFF:08x}"


def numbers(content: bytes, dtype: str) -> list[Any]:
    places = range(0, len(content), SIZES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return [struct.unpack("<f", b"\0\0" + content[place : place + 2])[0] for place in places]
    return [struct.unpack_from(CODES[dtype], content, place)[0] for place in places]


def tensor(name: str, entry: dict[str, Any], arrays: dict[str, list[Any]]) -> list[float]:
    if name in arrays:
        return arrays[name]
    rows, columns = entry["shape"]
    values, scale, fill = arrays[f"{name}.values"], arrays.get(f"{name}.scale"), entry.get("fill", 0.0)
    whole = []
    taken = 0
    for row in range(rows):
        entries = [fill] * columns
        for column in kept(name, entry["kind"], row, columns, arrays):
            entries[column] = values[taken]
            taken += 1
        if entry["kind"] == "bitmask" and row % 16 == 15:
            assert arrays[f"{name}.offsets"][(row + 1) // 16] == taken
        whole += entries if scale is None else [float32(value * scale[row]) for value in entries]
    assert taken == len(values)
    return whole


def kept(name: str, kind: str, row: int, columns: int, arrays: dict[str, list[Any]]) -> list[int]:
    """The columns of a row that have a value."""
    if kind == "dense":
        return list(range(columns))
    if kind == "bitmask":
        width, mask = -(-columns // 8), arrays[f"{name}.mask"]
        return [j for j in range(columns) if mask[row * width + j // 8] >> j % 8 & 1]
    n, m = map(int, kind.split(":"))
    b = 0
    while 2**b < m:
        b += 1
    count = columns // m * n
    width, index = -(-count * b // 8), arrays[f"{name}.index"]
    found = []
    for k in range(count):
        bits = [index[row * width + i // 8] >> i % 8 & 1 for i in range(k * b, k * b + b)]
        found.append(k // n * m + sum(bit << place for place, bit in enumerate(bits)))
    return found


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]
