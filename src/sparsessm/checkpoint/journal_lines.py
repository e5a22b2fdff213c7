"""The lines of a run's journal (journal.py): how they are read, and values in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = 2
FILE = "journal.jsonl"
_TENSOR = "__tensor__"


def read(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what was cut off is not one."""
    if not file.is_file():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    try:
        found = [json.loads(line) for line in lines]
        if found and found[0]["format"] != FORMAT:
            raise ValueError(f"format {found[0]['format']!r}; known: {FORMAT}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not a journal ({error}); begin anew (--force)") from None
    if rest:
        with open(file, "r+b") as content:
            content.truncate(sum(len(line) + 1 for line in lines))
    return found


def plain(what: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON takes it, with a number in place of each tensor, which joins `tensors`."""
    if isinstance(what, Tensor):
        tensors.append(what.cpu())
        return {_TENSOR: len(tensors) - 1}
    if isinstance(what, Mapping):
        return {name: plain(part, tensors) for name, part in what.items()}
    if isinstance(what, (list, tuple)):
        return [plain(part, tensors) for part in what]
    return what


def filled(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `plain`; `tensors`: by their numbers."""
    if isinstance(told, dict):
        if told.keys() == {_TENSOR}:
            return tensors[str(told[_TENSOR])]
        return {name: filled(part, tensors) for name, part in told.items()}
    return [filled(part, tensors) for part in told] if isinstance(told, list) else told


def difference(name: str, before: Any, now: Any) -> str:
    """What of a field of the first line is another, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in inner)
    return f"{name} {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
