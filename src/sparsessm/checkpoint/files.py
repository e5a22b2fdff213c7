"""The files of a checkpoint: JSON, and tensors as safetensors or `pytorch_model.bin`, one file or sharded.

Knows nothing of models. `reading.py` takes tensors from here one by one, `writing.py` hands them over in
shards; the runtime keeps a sequence's state in a file of its own (`write_one`, `read_one`).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.foreign import from_json, read_bytes

CONFIG, SAFETENSORS, BIN = "config.json", "model.safetensors", "pytorch_model.bin"
SHARD_BYTES = 5 * 10**9
"""Most bytes in one safetensors file, the stock writer's limit."""
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
    if not path.is_file():
        raise ValueError(f"no {path.name} in {str(path.parent)!r}: not a checkpoint directory")
    return parse_json(read_bytes(path), str(path))


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


def weight_files(folder: Path) -> list[Path]:
    """The stock files that `read_tensors` reads; stock order of preference.

    Raises:
        ValueError: there are none.
    """
    return stock_files(folder)[1]


def tensor_names(folder: Path) -> list[str]:
    """The names of the tensors that the stock files hold; by their heads, an index may say anything.

    Only a `.bin` older than torch 1.6 has no head, and is read for it.
    """
    name, files = stock_files(folder)
    if name == SAFETENSORS:
        return [found for file in files for found in names_in(_readable(file))]
    return [found for file in files for found, _ in read_bin(_readable(file))]


def _readable(file: Path) -> Path:
    if not os.access(file, os.R_OK):
        raise ValueError(f"{file}: no permission to read it")
    return file


def names_in(file: Path) -> Iterator[str]:
    with opened(file) as content:
        yield from content.keys()


def stock_files(folder: Path) -> tuple[str, list[Path]]:
    """The stock format of a checkpoint directory, by the name of its one file, and the files."""
    for name in (SAFETENSORS, BIN):
        if (folder / name).is_file():
            return name, [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return name, _shards(folder, folder / f"{name}.index.json")
    raise ValueError(f"no {SAFETENSORS} or {BIN} in {str(folder)!r}")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint directory, in the dtype it is stored in; stock order of preference."""
    name, files = stock_files(folder)
    read = _read_safetensors if name == SAFETENSORS else read_bin
    seen: set[str] = set()
    for file in files:
        for tensor_name, tensor in read(_readable(file)):
            if tensor_name in seen:
                raise ValueError(f"{file}: tensor {tensor_name} is in more than one shard")
            seen.add(tensor_name)
            yield tensor_name, tensor


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise ValueError(f"{index} names files that are not beside it: {few(missing)}")
    return [folder / name for name in names]


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with opened(file) as content:
        for name in content.keys():
            yield name, content.get_tensor(name)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
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
        raise ValueError(f"{file}: truncated or corrupt ({_first_line(error)})") from error
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).split("\n")[0]


def write_safetensors(folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor]) -> None:
    """Write tensors as the stock writer does: shards of at most `SHARD_BYTES`, with an index if there are
    several.

    Args:
        folder: where to.
        sizes: bytes of each tensor, by name, in the order to write them.
        tensor: the tensor of a name; asked for one shard at a time, so a large model is never in memory
            twice.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SAFETENSORS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor(name) for name in names}, folder / file, {"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
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
    with opened(file) as content:
        # copies: the file would stay mapped, and whoever rewrites it change the tensors
        tensors = {name: content.get_tensor(name).clone() for name in content.keys()}
        return tensors, dict(content.metadata() or {})
