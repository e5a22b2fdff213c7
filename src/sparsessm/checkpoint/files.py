"""The files of a checkpoint: JSON, and tensors as safetensors or `pytorch_model.bin`, one file or sharded.

Knows nothing of models. Tensors are read from here one by one, and written one by one in shards; the runtime
keeps a sequence's state in a file of its own (`write_one`, `read_one`).
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.foreign import first_line, from_json, read_bytes
from . import tensor_file
from .tensor_file import Form

CONFIG, SAFETENSORS, BIN = "config.json", "model.safetensors", "pytorch_model.bin"
SHARD_BYTES = 5 * 10**9
"""Most bytes in one safetensors file, the stock writer's limit."""
MAPPED = 1 << 25
"""Bytes of tensors that are taken from a mapped file before it is mapped anew."""
_NO_JSON = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def decode_float(found: dict[str, Any]) -> Any:
    """The `object_hook` of `json.loads` for {"__float__": "Infinity"}, which is how transformers writes a
    number that JSON does not have (the step limit of Mamba-2)."""
    value = found.get("__float__") if len(found) == 1 else None
    return _NO_JSON.get(value, found) if isinstance(value, str) else found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is absent, or holds something else.
    """
    return parse_json(json_bytes(path), str(path))


def json_bytes(path: Path) -> bytes:
    """All of a JSON file of a checkpoint.

    Raises:
        ValueError: the file is absent, too large, or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"no {path.name} in {str(path.parent)!r}: not a checkpoint directory")
    return read_bytes(path)


def parse_json(text: bytes | str, what: str, *, strict: bool = False) -> dict[str, Any]:
    """The JSON object in a text of somebody else; `what` is its name.

    Args:
        strict: for our own formats: no name twice, no NaN and no Infinity, and nothing stands for a float.

    Raises:
        ValueError: begins with `what`: not JSON, too deep, numbers or text that nothing could hold, or no
            object.
    """
    try:
        content = from_json(text, strict=strict, hook=None if strict else decode_float)
    except ValueError as error:
        raise ValueError(f"{what}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what}: expected a JSON object, got {type(content).__name__}")
    return content


def few(names: list[str], most: int = 5) -> str:
    """Names for an error message: the first `most`, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class StockFiles(NamedTuple):
    """The files of the weights of a stock checkpoint.

    Attributes:
        kind: the name of the one file that they could be: `SAFETENSORS` or `BIN`.
        paths: the files, one or the shards.
    """

    kind: str
    paths: list[Path]


def tensor_names(stock: StockFiles) -> dict[Path, list[str]]:
    """The names of the tensors in each file; by their heads, an index may say anything.

    Only a `.bin` older than torch 1.6 has no head, and is read for it.
    """
    names = _names_in if stock.kind == SAFETENSORS else _names_in_bin
    return {file: list(names(_readable(file))) for file in stock.paths}


def _readable(file: Path) -> Path:
    if not os.access(file, os.R_OK):
        raise ValueError(f"{file}: no permission to read it")
    return file


def _names_in(file: Path) -> Iterator[str]:
    with open_safetensors(file) as content:
        yield from content.keys()


def _names_in_bin(file: Path) -> Iterator[str]:
    return (name for name, _ in read_bin(file))


def read_tensors(stock: StockFiles) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a stock checkpoint, in the dtype it is stored in, one by one.

    They may be mapped. Of those that were dropped only `MAPPED` bytes stay in memory.
    """
    read = _read_safetensors if stock.kind == SAFETENSORS else _read_bin
    seen: set[str] = set()
    for file in stock.paths:
        for tensor_name, tensor in read(_readable(file)):
            if tensor_name in seen:
                raise ValueError(f"{file}: tensor {tensor_name} is in more than one shard")
            seen.add(tensor_name)
            yield tensor_name, tensor
            del tensor


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    done, left = 0, True
    while left:
        with open_safetensors(file) as content:  # anew: what was looked at of a mapped file stays in memory
            waiting, used = list(content.keys())[done:], 0
            while waiting and used <= MAPPED:
                name = waiting.pop(0)
                tensor = content.get_tensor(name)
                done, used = done + 1, used + tensor.nbytes
                yield name, tensor
                del tensor
            left = bool(waiting)


def _read_bin(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The same of a `.bin`; one that is no zip file is in memory as a whole."""
    done, left = 0, True
    most = MAPPED if zipfile.is_zipfile(file) else math.inf
    while left:
        waiting, used = list(read_bin(file))[done:], 0
        while waiting and used <= most:
            name, tensor = waiting.pop(0)
            done, used = done + 1, used + tensor.nbytes
            yield name, tensor
            del tensor
        left = bool(waiting)
        del waiting  # before the file is mapped again


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or not a safetensors file ({error})") from error


def read_bin(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is not a plain pickle of tensors"
        reason = f"not a file of plain tensors; refused, nothing in it was executed ({what})"
        raise ValueError(f"{file}: {reason}") from error
    except Exception as error:  # the zip reader has a different one in each release
        raise ValueError(f"{file}: truncated or corrupt ({first_line(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: expected a tensor, got {type(tensor).__name__} under {name!r}")
        plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized:
            raise ValueError(f"{file}: {name!r} is not a plain dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{file}: {name!r} is larger than the data that it has")
        yield name, tensor


def spans(file: Path) -> dict[str, tuple[int, int]]:
    """Where the tensors of a safetensors file lie that the library has read: (first byte, bytes), by name.

    Raises:
        OSError, ValueError: it cannot be read any more.
    """
    with open(file, "rb") as content:
        size = int.from_bytes(content.read(8), "little")
        head = parse_json(content.read(size), str(file))
    places = {name: entry["data_offsets"] for name, entry in head.items() if name != "__metadata__"}
    return {name: (8 + size + begin, end - begin) for name, (begin, end) in places.items()}


def write_safetensors(folder: Path, forms: Mapping[str, Form], tensor: Callable[[str], Tensor]) -> None:
    """Write tensors as the stock writer does: shards of at most `SHARD_BYTES`, with an index if there are
    several.

    Args:
        folder: where to.
        forms: of each tensor, by name, in the order to write them.
        tensor: the tensor of a name; asked for one by one in that order, and dropped before the next.

    Raises:
        ValueError, OSError: as `tensor_file.write`.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, form in forms.items():
        if shards[-1] and filled + form.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += form.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SAFETENSORS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensor_file.write(folder / file, {name: forms[name] for name in names}, tensor, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(form.nbytes for form in forms.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_one(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors and text beside them as one safetensors file, which appears whole or not at all.

    An existing file is replaced.

    Raises:
        ValueError: the directory does not exist, or the file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=file.parent) as folder:
            new = Path(folder) / "new"
            save_file(dict(tensors), new, dict(notes))
            new.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read
            new.replace(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be written ({error})") from error


def read_one(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file and the text beside them.

    Raises:
        ValueError: there is no such file, or it is truncated or something else.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    with open_safetensors(file) as content:
        # copies: the file would stay mapped, and whoever rewrites it change the tensors
        tensors = {name: content.get_tensor(name).clone() for name in content.keys()}
        return tensors, dict(content.metadata() or {})
