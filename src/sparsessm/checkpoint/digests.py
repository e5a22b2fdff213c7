"""Whether a file or a directory is still what it was: a digest that is cheap where files are large.

Place in the flow: beside it; `sparsessm run` asks it of what a step reads and of what it wrote, and `inspect`
compares the SHA-256 of files with those that somebody names.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ..data.foreign import from_json
from ..data.text_files import files_below

WHOLE = 16 << 20
"""Bytes up to which a file is read as a whole."""
_PART = 4096  # bytes out of each tensor of a larger one
_PARTS = 256  # and out of a file that has no tensors, evenly spaced
_LONGEST = 100_000_000  # bytes of the head of a safetensors file


def digest(path: Path, *, without: Collection[str] = ()) -> str:
    """SHA-256 over the names, sizes and contents of a file or of all files of a directory, 64 hex digits.

    Of a file above `WHOLE` bytes the contents are: in safetensors the head and 4 KiB from the middle of each
    tensor; else its first and last MiB and 256 parts of 4 KiB, evenly spaced.

    Args:
        without: names directly in the directory that do not count.

    Raises:
        OSError: as the file system reports it; there is nothing.
    """
    if not path.is_dir():
        return _content(path)
    told = hashlib.sha256()
    for file in files_below(path):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in without:
            told.update(f"{len(name)} {name} {_content(file)}\n".encode(errors="replace"))
    return told.hexdigest()


def refuse_others(folder: Path, expected: Iterable[str]) -> None:
    """Refuse a directory where a file is not the one that was expected.

    Args:
        expected: each NAME=SHA256, of a file in the directory.

    Raises:
        ValueError: another file, none, or no such digest; names it.
    """
    for told in expected:
        name, equals, wanted = told.rpartition("=")
        wanted = wanted.strip().lower()
        if not equals or len(wanted) != 64 or set(wanted) - set("0123456789abcdef"):
            raise ValueError(f"--sha256 is {told!r}; allowed: FILE=SHA256 with 64 hex digits")
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
            raise ValueError(f"--sha256 names {name!r}, which is no file in {str(folder)!r}")
        with open(file, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(f"{file}: its SHA-256 is {found}, expected was {wanted}")


def _content(file: Path) -> str:
    told = hashlib.sha256()
    size = file.stat().st_size
    told.update(f"{size}\n".encode())
    with open(file, "rb") as content:
        if size <= WHOLE:
            told.update(content.read())
            return told.hexdigest()
        for start, end in _parts(file, size):
            content.seek(start)
            told.update(content.read(max(0, end - start)))
    return told.hexdigest()


def _parts(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """First and last byte (excluded) of what is read of a large file."""
    if file.suffix == ".safetensors":
        with open(file, "rb") as content:
            (head,) = struct.unpack("<Q", content.read(8))
            text = content.read(head) if head <= min(_LONGEST, size) else b""
        try:
            fields = from_json(text)
            spans = [entry["data_offsets"] for name, entry in fields.items() if name != "__metadata__"]
            yield 0, 8 + head
            for start, end in sorted((int(start), int(end)) for start, end in spans):
                middle = 8 + head + (start + end) // 2
                yield max(0, middle - _PART // 2), min(size, middle + _PART // 2)
            return
        except (ValueError, TypeError, KeyError, AttributeError):  # damaged: whoever loads it says so
            pass
    edge = 1 << 20
    yield 0, edge
    yield from ((at, at + _PART) for at in range(edge, size - edge, max(1, (size - 2 * edge) // _PARTS)))
    yield size - edge, size
