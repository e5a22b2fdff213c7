"""Fuzzes the reader of packed files; not part of the package.

    pip install --target build/atheris atheris
    PYTHONPATH=build/atheris .venv/bin/python tools/fuzz_packed.py \
        build/inputs tests/golden tests/corpus/packed -max_total_time=120 -max_len=8192

Whatever the bytes are, reading them must end in a ValueError or in tensors that keep every promise of
`docs/sparse-format.md`. `one` is that check; `tests/checkpoint/test_packed_fuzz.py` replays the inputs of
`tests/corpus/packed` with it, and does not need atheris.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsessm.checkpoint import assembly, coded, container, encoding, opened, packed_file, stacked
from sparsessm.checkpoint.encoding import bits_of

GOLDEN = Path(__file__).parents[1] / "tests/golden"
MOST = 8192
PARTS = (
    *("values", "mask", "offsets", "starts", "index", "codes", "planes", "forms"),
    *("ends", "stream", "classes", "tables", "scale", "scales", "rows", "columns"),
)
VALUES = [
    0,
    1,
    -1,
    2,
    3,
    4,
    8,
    16,
    24,
    32,
    64,
    2**31,
    2**63,
    10**40,
    0.5,
    38.0,
    1e300,
    True,
    None,
    "",
    [],
    {},
]
VALUES += ["F32", "BF16", "F16", "I8", "U8", "I64", "float32", "bfloat16", "float16", "dense", "bitmask"]
VALUES += [
    "2:4",
    "1:4",
    "4:8",
    "1:2",
    "3:4",
    "1:8",
    "999:999",
    "int4:16",
    "odd2:3",
    "masked8:9",
    "nested",
    "ans",
    "stack",
    "state-spaces",
    "transformers",
    "1",
    "2",
    "3",
    "4",
]


def expected(config: Path = GOLDEN / "lossless/config.json") -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the model that a `config.json` describes."""
    settings = opened.stock_config("golden", json.loads(config.read_text()), False)
    _, tensors, _ = assembly.stock_model("golden", settings)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def one(content: bytes, shapes: dict[str, tuple[int, ...]], folder: Path) -> str | None:
    """Read a file of these bytes.

    Args:
        folder: of scratch files.

    Returns:
        What the reader said against it, None if it is a valid file.

    Raises:
        AssertionError: what was read breaks a promise. Anything else: a bug of the reader.
    """
    file = folder / container.PACKED
    file.write_bytes(content)
    try:
        header = container.read_header(file)
        tensors = dict(container.read_tensors(header, shapes))
    except ValueError as error:
        assert str(error).startswith(str(file)), error
        return str(error)
    again = folder / "again.safetensors"
    packed_file.write(again, header.format, tensors)
    second = dict(container.read_tensors(container.read_header(again), shapes))
    for name, tensor in tensors.items():
        whole = tensor.decode()
        assert whole.dtype == tensor.dtype and tuple(whole.shape) == shapes[name]
        assert torch.isfinite(whole).all(), name
        others = [tensor.bitmask()] if isinstance(tensor, encoding.Encoded) else []
        for other in (second[name], *others):
            other.check()
            assert np.array_equal(bits_of(other.decode()), bits_of(whole)), name
    return None


def sealed(header: Any, arrays: bytes) -> None:
    """Write the checksums of a header that was read from JSON anew, as far as it has places for them."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tensors"), str):
        return
    try:
        tensors = json.loads(metadata["tensors"])
    except (ValueError, RecursionError):
        tensors = None
    for name, entry in tensors.items() if isinstance(tensors, dict) else ():
        each = entry.get("each") if isinstance(entry, dict) else None
        single = (
            {f"{name}.{place}": one for place, one in enumerate(each)}
            if isinstance(each, list)
            else {name: entry}
        )
        for one, told in single.items():
            if isinstance(told, dict):
                names = (one, *(f"{one}.{part}" for part in PARTS))
                told["checksum"] = container.checksum([_array(header.get(array), arrays) for array in names])
    if isinstance(tensors, dict) and len(tensors) == metadata["tensors"].count('"shape"'):  # no name twice
        metadata["tensors"] = json.dumps(tensors)
    text = metadata["tensors"].encode("utf-8", "surrogatepass")
    metadata["checksum"] = container.checksum([text])


def _array(entry: Any, arrays: bytes) -> bytes:
    """The bytes of an array, none if its entry does not say which."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        return arrays[max(offsets[0], 0) : max(offsets[1], 0)]
    return b""


def mutated(content: bytes, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """A file whose header still is JSON, with one value of it or some bytes of the arrays changed: bytes
    changed at random hardly get past the JSON.

    Args:
        mutate: (bytes, largest length) -> changed bytes.
    """
    draw = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        tensors = json.loads(header["__metadata__"]["tensors"])
        places = [*_places(header), *(_places(tensors) * 2)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return mutate(content, MOST)
    arrays = content[8 + length :]
    if not places or draw.random() < 0.4:
        arrays = mutate(arrays, len(arrays)).ljust(len(arrays), b"\0") if arrays else b""
    for _ in range(draw.randint(0, 2) if places else 0):
        holder, key = draw.choice(places)
        other, name = draw.choice(places)
        if draw.random() < 0.3:
            value = other[name] if name in other or isinstance(other, list) else None
        else:
            value = draw.choice(VALUES)
        holder[key] = value
    if isinstance(header.get("__metadata__"), dict):
        try:
            header["__metadata__"]["tensors"] = json.dumps(tensors)
        except ValueError:  # it holds itself by now
            return mutate(content, MOST)
    try:
        if draw.random() < 0.95:  # else every change ends at a checksum
            sealed(header, arrays)
        head = json.dumps(header).encode()
    except ValueError:
        return mutate(content, MOST)
    return (len(head).to_bytes(8, "little") + head + arrays)[:MOST]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(object or list, key or index) of all that is in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def main() -> None:
    import atheris  # pyright: ignore[reportMissingImports]

    for name in ("container", "described", "encoding", "coded", "nested", "stacked"):
        module = sys.modules[f"sparsessm.checkpoint.{name}"]
        kinds = (encoding.Encoded, coded.Coded, stacked.Stacked)
        for function in [*vars(module).values(), *(part for kind in kinds for part in vars(kind).values())]:
            if getattr(function, "__module__", "") == module.__name__ and hasattr(function, "__code__"):
                atheris.instrument_func(function)
    shapes = expected()
    with tempfile.TemporaryDirectory() as scratch:

        def check(content: bytes) -> None:
            one(content, shapes, Path(scratch))

        def mutator(content: bytes, most: int, seed: int) -> bytes:
            return mutated(content, seed, atheris.Mutate)[:most]

        atheris.Setup(sys.argv, check, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
