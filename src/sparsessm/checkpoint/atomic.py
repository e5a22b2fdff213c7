"""Write a directory, or one file, so that it appears whole or not at all.

Everything is written into one hidden sibling of the target, `.NAME.saving-XXXX/new`, and renamed into place
at the end; a replaced directory waits in `.NAME.saving-XXXX/old` until the rename has succeeded. The sibling
is locked while its writer lives, so what a killed run left is recognised, and put back or removed by whoever
next writes to the same target. Whatever would stop all this is asked beforehand by `refuse_target` and
`refuse_room`. Used by `writing.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..data.inert import is_text
from ..data.unfinished import undoing

_SAVING = ".saving-"
_RANDOM = 8  # characters that tell siblings apart
_INSIDE = 100  # bytes of the longest path below the sibling
_MARGIN = 1 << 20  # bytes beside the tensors: the small files, and blocks that are not full


@contextmanager
def replacing(target: Path, *, force: bool = False, folder: bool = True) -> Iterator[Path]:
    """Yield a new empty directory that becomes `target` when the block ends without an exception.

    On any exception (Ctrl-C and a full disk included) nothing stays behind and an old target is where it was.

    Args:
        folder: False for the name of a file, which the block writes.

    Raises:
        FileExistsError: `target` exists and `force` is false.
        OSError: as the file system reports it.
    """
    target = target.resolve()
    recover(target)
    parents = _missing(target.parent)
    staging = target.parent / f"{_prefix(target)}{secrets.token_hex(_RANDOM // 2)}"  # not there yet

    def undo() -> None:
        _settle(staging, target)
        for parent in parents:  # those that hold the result, or something of others, stay
            with suppress(OSError):
                parent.rmdir()

    lock = None
    try:
        with undoing(undo):
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir(mode=0o700)
            new, old = staging / "new", staging / "old"
            lock = os.open(staging, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: the sibling of a killed run then stays
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder:
                new.mkdir()
            yield new
            _flush(new)
            if os.path.lexists(target):
                if not force:
                    raise FileExistsError(f"{target} appeared while the result was being written")
                os.rename(target, old)
            os.rename(new, target)
        flush_directory(target.parent)
    finally:
        if lock is not None:
            os.close(lock)


def write_text(file: Path, text: str) -> None:
    """Write a file of text, in place of an old one if there is one.

    Raises:
        OSError: as the file system reports it; nothing is left behind, an old file is intact.
    """
    with replacing(file, force=True, folder=False) as new:
        new.write_text(text, encoding="utf-8")


def recover(target: Path) -> None:
    """Clear up what killed runs left beside `target`; a directory one of them had moved aside goes back."""
    target = target.resolve()
    if not target.parent.is_dir():
        return
    prefix = _prefix(target)
    for sibling in sorted(target.parent.iterdir()):
        name = sibling.name
        # one of the target "NAME.saving-x" begins in the same way
        if not name.startswith(prefix) or _SAVING in name.removeprefix(prefix) or not sibling.is_dir():
            continue
        with suppress(OSError):  # not ours to open, or gone already
            lock = os.open(sibling, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                _settle(sibling, target)
            finally:
                os.close(lock)


def refuse_target(path: str | os.PathLike[str], *, replaced: bool = True) -> Path:
    """Refuse a name that no directory can be made under or put in the place of, by making one beside it.

    Args:
        replaced: whether a directory that is there makes room for the new one; else it will be written into.

    Returns:
        The path without links and `..`.

    Raises:
        ValueError: an empty name, one that is not UTF-8 or too long for the file system, a circle of links; a
            mount point, the current directory or one that it is in; a parent that is a file or where nothing
            can be written.
    """
    shown = os.fspath(path)
    if not os.fsdecode(shown) or "\0" in shown or not is_text(shown):
        raise ValueError(
            f"{shown!r} cannot be made: the name of a directory is not empty, is UTF-8 and has no zero byte"
        )
    try:
        target = Path(path).resolve()
        if target.is_symlink():  # what Python 3.13 makes of a circle
            raise RuntimeError
        if replaced:
            _refuse_place(target, shown)
            recover(target)
        nearest = nearest_directory(target.parent if replaced else target, shown)
        _refuse_long(target, nearest, shown)
        if replaced and os.path.lexists(target):
            _refuse_fixed(target, shown)
        _try(target, nearest)
    except RuntimeError:
        raise ValueError(f"{shown!r} cannot be made: its links lead in a circle") from None
    except OSError as error:
        told = error.strerror or error
        raise ValueError(f"{shown!r} cannot be made: {told}") from None
    return target


def refuse_room(path: str | os.PathLike[str], needed: int) -> None:
    """Refuse to write more than there is room for; what stands there now stays until the end.

    Args:
        needed: bytes of the result. A quota cannot be asked for.

    Raises:
        ValueError: says both numbers.
    """
    shown = os.fspath(path)
    try:
        free = shutil.disk_usage(nearest_directory(Path(path).resolve().parent, shown)).free
    except OSError:
        return  # a file system that does not say
    most = needed + needed // 100 + _MARGIN
    if most > free:
        raise ValueError(
            f"{shown!r} needs about {most:,} bytes, but its disk has room for {free:,}; free some, or write "
            "the result somewhere else"
        )


def nearest_directory(folder: Path, shown: str) -> Path:
    """The directory, or the first of its parents that exists.

    Raises:
        ValueError: that is a file.
    """
    nearest = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not nearest.is_dir():
        raise ValueError(f"{shown!r} cannot be made: {str(nearest)!r} is a file")
    return nearest


def _refuse_place(target: Path, shown: str) -> None:
    here = Path.cwd()
    if target == here or target in here.parents:
        raise ValueError(f"{shown!r} is or contains the current directory; name a directory inside it")
    if os.path.ismount(target):
        raise ValueError(f"{shown!r} is a mount point, which cannot be replaced; name a directory inside it")


def _refuse_long(target: Path, nearest: Path, shown: str) -> None:
    most = _longest_name(nearest)
    for part in target.relative_to(nearest).parts:
        if (size := len(os.fsencode(part))) > most:
            raise ValueError(f"{shown!r} cannot be made: its name has {size} bytes; allowed here: {most}")
    try:
        longest = os.pathconf(nearest, "PC_PATH_MAX")
    except (OSError, ValueError):
        longest = 4096
    size = len(os.fsencode(target.parent / _prefix(target))) + _INSIDE
    if size > longest:
        raise ValueError(
            f"{shown!r} cannot be made: paths in it have up to {size} bytes; allowed here: {longest}"
        )


def _refuse_fixed(target: Path, shown: str) -> None:
    """Refuse a directory that cannot be moved aside."""
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
        raise ValueError(f"{shown!r} cannot be replaced: no permission to write in it")
    parent, me = target.parent.stat(), os.geteuid()
    if parent.st_mode & stat.S_ISVTX and me not in (0, parent.st_uid, target.stat().st_uid):
        raise ValueError(f"{shown!r} cannot be replaced: it belongs to another user")


def _try(target: Path, nearest: Path) -> None:
    """Make a directory where the target or its first parent will be, and remove it."""
    made = nearest / f"{_prefix(target)}{secrets.token_hex(_RANDOM // 2)}"

    def undo() -> None:
        with suppress(FileNotFoundError):  # another run may have cleared it up
            made.rmdir()

    with undoing(undo):
        made.mkdir(mode=0o700)


def _prefix(target: Path) -> str:
    """How siblings of a target begin: by its name, of a long one by its beginning and a hash of it."""
    name, room = target.name, _longest_name(target.parent) - len(f".{_SAVING}") - _RANDOM
    if len(os.fsencode(name)) > room:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = os.fsencode(name)[: max(0, room - len(digest) - 1)].decode(errors="ignore") + f"-{digest}"
    return f".{name}{_SAVING}"


def _longest_name(folder: Path) -> int:
    """Bytes of a name in a directory, or where it would be made."""
    for parent in (folder, *folder.parents):
        with suppress(OSError, ValueError):
            return os.pathconf(parent, "PC_NAME_MAX")
    return 255


def _settle(staging: Path, target: Path) -> None:
    """Put a directory that waits aside back if nothing took its place, then remove the sibling."""
    old = staging / "old"
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
    shutil.rmtree(staging, ignore_errors=True)


def _missing(folder: Path) -> list[Path]:
    """The directories that must be made for `folder`, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _flush(folder: Path) -> None:
    """Wait until a file, or a folder with all in it, is on the disk: a rename must not outrun its data."""
    for path in (folder, *folder.rglob("*")):
        flush_directory(path)


def flush_directory(folder: Path) -> None:
    """Wait until a directory, or a file, is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
