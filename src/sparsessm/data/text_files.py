"""Local texts: one file, or all files below a directory -> documents, whoever wrote them.

Place in the flow: `texts.py` asks here for what is not a named data set. A text that was written on Windows
(byte order mark, UTF-16, lines that end in CRLF) is the same text.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .foreign import decoded, from_json, short
from .inert import is_text

FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet")
PACKED = ".gz"  # each of them, but for .parquet, which is compressed inside
COLUMN = "text"
MOST_UNPACKED = 1 << 31
"""Most bytes that one compressed file may become: more than any calibration needs, less than would fill a
machine."""


def file_type(name: str | Path) -> str | None:
    """ ".txt", ".jsonl", ".json" or ".parquet", by the end of a name in any case; None for anything else."""
    name = os.path.basename(name).lower()
    name, packed = name.removesuffix(PACKED), name.endswith(PACKED)
    kind = next((kind for kind in FILE_TYPES if name.endswith(kind)), None)
    return None if packed and kind == ".parquet" else kind


def is_local(data: str) -> bool:
    """Whether a text is named by a path: a file of a known type, a directory, or anything with a `/`."""
    return file_type(data) is not None or "/" in data or os.sep in data or os.path.isdir(data)


def read_texts(data: str, column: str | None = None) -> list[str]:
    """The documents of a file, or of all files of known types below a directory, in the order of their names.

    Args:
        data: the path. A .txt file is one document; of a .jsonl file every line is one, of a .json file every
            item of its list, of a .parquet file every row. Hidden files and directories are left alone.
        column: the field or column that holds the text; `text` if not given.

    Raises:
        ValueError: begins with what was given: nothing there, nothing to read in it, or a file that cannot be
            read; names the file, and of a wrong column those that there are.
    """
    shown = f"data {data!r}"
    if not is_text(data):
        raise ValueError(f"{shown}: its name is not UTF-8; rename it")
    path = Path(data)
    try:
        if not path.is_dir():
            return _documents(path, column)
        files = [file for file in files_below(path) if file_type(file)]
        if not files:
            known = ", ".join((*FILE_TYPES, f"these with {PACKED}"))
            raise ValueError(f"it contains no file of a known type; known: {known}")
        if column is not None and all(file_type(file) == ".txt" for file in files):
            raise ValueError(f"column {column!r} has no effect: all its files are .txt")
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    documents: list[str] = []
    for file in files:
        try:
            documents += _documents(file, None if file_type(file) == ".txt" else column)
        except ValueError as error:
            raise ValueError(f"{shown}: {short(str(file.relative_to(path)))}: {error}") from None
    return documents


def files_below(folder: Path) -> list[Path]:
    """All files of a directory in the order of their names, directories among them.

    Through links, but through each directory once. What begins with a dot is left out.

    Raises:
        ValueError: a directory that cannot be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def broken(error: OSError) -> None:
        raise ValueError(f"{short(str(error.filename))} cannot be read ({error.strerror})")

    for base, folders, files in os.walk(folder, followlinks=True, onerror=broken):
        status = os.stat(base)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in files if not name.startswith("."))
        found += [Path(base) / name for name in names]
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _documents(path: Path, column: str | None) -> list[str]:
    kind = file_type(path)
    if kind is None:
        known = "/".join(FILE_TYPES)
        raise ValueError(
            f"no such directory, and not a {known} file (or {PACKED})"
            if not os.path.lexists(path)
            else f"not of a known type: {known} (or {PACKED}), or a directory of such files"
        )
    if kind == ".txt" and column is not None:
        raise ValueError(f"column {column!r} has no effect on a .txt file")
    if not path.is_file():
        if path.exists():
            raise ValueError("not a regular file")
        raise ValueError("a link that leads nowhere" if path.is_symlink() else "no such file")
    if kind == ".parquet":
        return _parquet(path, column or COLUMN)
    text = _text(path)
    if kind == ".txt":
        return [text]
    if kind == ".json" and text.lstrip()[:1] == "[":
        try:
            items = from_json(text)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from None
        return [_text_of(item, column, f"item {number}") for number, item in enumerate(items, 1)]
    return list(_lines(text, column))


def _text(path: Path) -> str:
    """The text of a file, unpacked, its lines ended as Unix ends them."""
    try:
        if path.name.lower().endswith(PACKED):
            content = b"".join(_unpacked(path))
        else:
            content = path.read_bytes()
    except EOFError:
        raise ValueError("truncated: the compressed file ends too early") from None
    except zlib.error as error:
        raise ValueError(f"damaged: it cannot be unpacked ({error})") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from None
    text = decoded(content)
    if "\0" in text:
        raise ValueError(f"not a text file (a zero byte, at character {text.index(chr(0))})")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unpacked(path: Path) -> Iterator[bytes]:
    import gzip

    left = MOST_UNPACKED
    with gzip.open(path) as file:
        while piece := file.read(1 << 20):
            left -= len(piece)
            if left < 0:
                raise ValueError(f"more than {MOST_UNPACKED:,} bytes when unpacked; take a part of it")
            yield piece


def _lines(text: str, column: str | None) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except ValueError as error:
            told = str(error)
            what = told if "not a Unicode text" in told else f"not JSON ({told})"
            raise ValueError(f"line {number}: {what}") from None
        yield _text_of(row, column, f"line {number}")


def _text_of(row: Any, column: str | None, where: str) -> str:
    """The text in one line or item: its field, or the item itself where no field is asked for."""
    if isinstance(row, str) and column is None:
        return row
    name = column or COLUMN
    if not isinstance(row, dict):
        raise ValueError(f"{where}: needs an object with a string field {name!r}, got {type(row).__name__}")
    if not isinstance(row.get(name), str):
        raise ValueError(f"{where}: needs an object with a string field {name!r}; {columns(row)}")
    return row[name]


def columns(names: Iterable[Any]) -> str:
    """The columns that there are, for an error message."""
    names = [short(name)[1:-1] for name in names]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"there: {', '.join(names[:20]) or 'none'}{more} (choose with column=, --column)"


def _parquet(path: Path, column: str) -> list[str]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(".parquet needs pyarrow; install sparsessm[data]") from error
    try:
        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise ValueError(f"no column {column!r}; {columns(names)}")
        texts = pyarrow.parquet.read_table(path, columns=[column]).column(column).to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"needs a readable column {column!r} ({told})") from None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the column {column!r} must hold strings only")
    return texts
