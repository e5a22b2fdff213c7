"""The small files of a checkpoint directory, each read once, however often it is asked for.

Several parts need the same few files: `config.json` says the model, the tokenizer's class and which code
belongs to it, and is carried over. They ask one `Folder`, so that they cannot see two versions of a file.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from .files import BIN, SAFETENSORS, StockFiles, few, json_bytes, parse_json


class Folder:
    """The small files of a directory, by their names or paths in it.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents: dict[str, bytes] = {}

    @cached_property
    def entries(self) -> list[Path]:
        """What lies in it, sorted."""
        return sorted(self.path.iterdir())

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self.path / name)  # also of a name that no file can have

    def content(self, name: str) -> bytes:
        """All of a file.

        Raises:
            OSError: as the file system reports it.
        """
        if name not in self._contents:
            self._contents[name] = (self.path / name).read_bytes()
        return self._contents[name]

    def text(self, name: str) -> str:
        """A file of UTF-8, its lines ended by a newline; empty if it is something else or cannot be read."""
        try:
            return self.content(name).decode().replace("\r\n", "\n").replace("\r", "\n")
        except (OSError, UnicodeDecodeError):
            return ""

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file.

        Raises:
            ValueError: the file is absent, too large, or holds something else.
        """
        path = self.path / name
        if name not in self._contents:
            self._contents[name] = json_bytes(path)
        return parse_json(self._contents[name], str(path))

    def json_if_any(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, an empty one if there is no such file."""
        return self.json(name) if self.has(name) else {}

    @cached_property
    def stock_files(self) -> StockFiles:
        """The files of its weights, those of safetensors where there are both kinds.

        Raises:
            ValueError: there are none, or an index names files that are not beside it.
        """
        for kind in (SAFETENSORS, BIN):
            if self.has(kind):
                return StockFiles(kind, [self.path / kind])
            if self.has(f"{kind}.index.json"):
                return StockFiles(kind, self._shards(f"{kind}.index.json"))
        raise ValueError(f"no {SAFETENSORS} or {BIN} in {str(self.path)!r}")

    def _shards(self, index: str) -> list[Path]:
        told, weight_map = self.path / index, self.json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{told}: no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if missing := [name for name in names if Path(name).name != name or not self.has(name)]:
            raise ValueError(f"{told} names files that are not beside it: {few(missing)}")
        return [self.path / name for name in names]
