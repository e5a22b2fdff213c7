"""A reader of packed files in plain Python, written from docs/sparse-format.md alone, one entry at a time.

It shares no line with the package and uses neither torch, numpy nor safetensors.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "I64": 8}
PARTS = (
    *("values", "mask", "offsets", "starts", "index", "codes", "planes", "forms"),
    *("ends", "stream", "classes", "tables", "scale", "scales", "rows", "columns"),
)
CODES = {"F32": "<f", "F16": "<e", "I8": "<b", "U8": "<B", "I64": "<q"}


def read(file: Path) -> dict[str, tuple[list[int], str, list[float]]]:
    """Stock tensor -> (shape, dtype, entries row by row); those of int8 in float32, not rounded further."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "sparsessm-packed" and metadata["version"] in ("1", "2", "3", "4")
    assert crc32c(metadata["tensors"].encode()) == metadata["checksum"], "the header is damaged"
    described = json.loads(metadata["tensors"])
    single = {}  # the tensors with arrays of their own: of a stack its matrices
    for name, entry in described.items():
        if entry["kind"] == "stack":
            assert len(entry["each"]) == entry["shape"][0]
            single |= {
                f"{name}.{e}": {"shape": entry["shape"][1:], **of} for e, of in enumerate(entry["each"])
            }
        else:
            single[name] = entry
    kinds = {entry["kind"][:3] for entry in single.values()}
    coded = bool(kinds & {"int", "odd", "mas", "nes"})
    least = "3" if "ans" in kinds else "2" if coded else "1"
    assert metadata["version"] == ("4" if single.keys() != described.keys() else least)
    arrays, raw = {}, {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        raw[name] = content[begin:end]
        arrays[name] = numbers(raw[name], entry["dtype"])
    for name, entry in single.items():
        parts = (name, *(f"{name}.{part}" for part in PARTS))
        assert crc32c(b"".join(raw.get(part, b"") for part in parts)) == entry["checksum"], name
    values = {name: tensor(name, entry, arrays) for name, entry in single.items()}
    found = {}
    for name, entry in described.items():
        matrices = [f"{name}.{e}" for e in range(entry["shape"][0])] if entry["kind"] == "stack" else [name]
        entries = [value for matrix in matrices for value in values[matrix]]
        found[name] = entry["shape"], entry["dtype"], entries
    return found


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
    if entry["kind"] == "nested":
        return nested(name, rows, columns, arrays)
    if entry["kind"] == "ans":
        return ans(name, rows, columns, arrays)
    if entry["kind"][:3] in ("int", "odd", "mas"):
        return fixed(name, entry["kind"], rows, columns, arrays)
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


def number(array: list[int], first: int, bits: int) -> int:
    """Some bits of an array of bytes, the lowest first."""
    places = range(first, first + bits)
    return sum((array[i // 8] >> i % 8 & 1) << place for place, i in enumerate(places))


def fixed(name: str, kind: str, rows: int, columns: int, arrays: dict[str, list[Any]]) -> list[float]:
    form, _, group = kind.partition(":")
    word, b, group = form[:-1], int(form[-1]), int(group)
    codes, scales = arrays[f"{name}.codes"], arrays[f"{name}.scales"]
    groups, whole, taken = -(-columns // group), [], 0
    for row in range(rows):
        entries = [0.0] * columns
        for column in kept(name, "bitmask" if word == "masked" else "dense", row, columns, arrays):
            if word == "masked":
                n = number(codes, taken * b, b)
                code = n - 2 ** (b - 1)
                code += code >= 0
            else:
                n = number(codes, row * -(-columns * b // 8) * 8 + column * b, b)
                code = n - 2 ** (b - 1) if word == "int" else 2 * n + 1 - 2**b
            entries[column] = float32(code * scales[row * groups + column // group])
            taken += 1
        if word == "masked" and row % 16 == 15:
            assert arrays[f"{name}.offsets"][(row + 1) // 16] == taken
        whole += entries
    return whole


def nested(name: str, rows: int, columns: int, arrays: dict[str, list[Any]]) -> list[float]:
    planes, forms = arrays[f"{name}.planes"], arrays[f"{name}.forms"]
    by_row, by_column = factors(name, arrays)
    whole, at = [], 0

    def taken(bits: int = 1) -> int:
        nonlocal at
        at += bits
        return number(planes, at - bits, bits)

    for first in range(0, rows, 16):
        some = range(first, min(first + 16, rows))
        at = 8 * arrays[f"{name}.starts"][first // 16]
        form = {row: forms[row // 2] >> row % 2 * 4 & 15 for row in some}
        high = {}
        for row in some:
            places = list(range(columns)) if form[row] else []
            if form[row] == 1:
                eights = [taken() for _ in range(-(-columns // 8))]
                places = [column for column in places if eights[column // 8]]
            high |= {(row, column): 1 for column in places if taken()}
        signs = {place: -1 if taken() else 1 for place in high}
        left = list(high)
        while left:
            left = [place for place in left if taken()]
            for place in left:
                high[place] += 1
        for row in some:
            low = max(form[row] - 2, 0)
            for column in range(columns):
                code = high.get((row, column), 0) * signs.get((row, column), 1) * 2**low
                code += taken(low) - 2 ** (low - 1) if low else 0
                whole.append(float32(float32(code * by_row[row]) * by_column[column]))
        assert -(-at // 8) == arrays[f"{name}.starts"][first // 16 + 1]
    return whole


def factors(name: str, arrays: dict[str, list[Any]]) -> list[list[float]]:
    parts = (arrays[f"{name}.{part}"] for part in ("rows", "columns"))
    return [[struct.unpack("<e", struct.pack("<H", bits << 7))[0] for bits in part] for part in parts]


def ans(name: str, rows: int, columns: int, arrays: dict[str, list[Any]]) -> list[float]:
    ends, stream, classes, held = (
        arrays[f"{name}.{part}"] for part in ("ends", "stream", "classes", "tables")
    )
    tables, at = [], 0
    while at < len(held):
        most, at = held[at], at + 1
        often = [n if n < 32 else (32 + n % 32) << (n // 32 - 1) for n in held[at : at + most]]
        at += most
        symbols = [(0, 4096 - 2 * sum(often))]
        for token, frequency in enumerate(often, 1):
            symbols += [(token, frequency), (-token, frequency)]
        tables.append([(symbol, f, i) for symbol, f in symbols for i in range(f)])  # for each of 4096 slots
    t, b = len(tables), {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}[len(tables)]
    assert len(classes) == -(-b * (rows + columns) // 8)
    row_class, column_class = (
        [number(classes, b * i, b) for i in part] for part in (range(rows), range(rows, rows + columns))
    )
    together = 64
    while together * columns < 2**15:
        together *= 2
    by_row, by_column = factors(name, arrays)
    whole, end = [], 0
    for group, first in enumerate(range(0, rows, together)):
        at, end = end, ends[group]
        state = [number(stream, 8 * at + 32 * k, 32) for k in range(4)]
        at += 16
        coded = []
        for row in range(first, min(first + together, rows)):
            for column in range(columns):
                which = min(max(row_class[row] + column_class[column] - t // 2, 0), t - 1)
                x = state[column % 4]
                token, f, i = tables[which][x % 4096]
                x = f * (x // 4096) + i
                if x < 2**16:
                    x, at = 2**16 * x + stream[at] + 256 * stream[at + 1], at + 2
                state[column % 4] = x
                coded.append((row, column, token))
        assert state == [2**16] * 4
        place = 8 * at
        for row, column, token in coded:
            size = abs(token)
            if size >= 16:
                more = (size - 16) // 4 + 2
                size = (4 + size % 4) * 2**more + number(stream, place, more)
                place += more
            code = -size if token < 0 else size
            whole.append(float32(float32(code * by_row[row]) * by_column[column]))
        assert -(-place // 8) == end
    assert end == len(stream)
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
