"""Write a directory so that it appears whole or not at all.

Everything is written into one hidden sibling of the target, `.NAME.saving-XXXX/new`, and renamed into place
at the end; a replaced directory waits in `.NAME.saving-XXXX/old` until the rename has succeeded. The sibling
is locked while its writer lives, so what a killed run left is recognised, and put back or removed by whoever
next writes to the same target. Used by `writing.py`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a new empty directory that becomes `target` when the block ends without an exception.

    On any exception (Ctrl-C and a full disk included) nothing stays behind and an old target is where it was.

    Raises:
        FileExistsError: `target` exists and `force` is false.
        OSError: as the file system reports it.
    """
    target = target.resolve()
    recover(target)
    parents = _make_parents(target.parent)
    done = False
    try:
        staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        new, old = staging / "new", staging / "old"
        lock = os.open(staging, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks: the sibling of a killed run then stays
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.mkdir()
            yield new
            _flush(new)
            if os.path.lexists(target):
                if not force:
                    raise FileExistsError(f"{target} came into being while it was being written")
                os.rename(target, old)
            os.rename(new, target)
            done = True
        finally:
            _settle(staging, target)
            os.close(lock)
        _flush_directory(target.parent)
    finally:
        if not done:
            for parent in parents:
                with suppress(OSError):
                    parent.rmdir()


def recover(target: Path) -> None:
    """Clear up what killed runs left beside `target`; a directory one of them had moved aside goes back."""
    target = target.resolve()
    if not target.parent.is_dir():
        return
    for sibling in sorted(target.parent.iterdir()):
        if not sibling.name.startswith(_prefix(target)) or not sibling.is_dir():
            continue
        with suppress(OSError):  # not ours to open, or gone already
            lock = os.open(sibling, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                _settle(sibling, target)
            finally:
                os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-"


def _settle(staging: Path, target: Path) -> None:
    """Put a directory that waits aside back if nothing took its place, then remove the sibling."""
    old = staging / "old"
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
    shutil.rmtree(staging, ignore_errors=True)


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder`; returns the directories that did not exist before, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _flush(folder: Path) -> None:
    """Wait until every file below `folder` is on the disk: a rename must not outrun the data it publishes."""
    for base, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(base, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(base))


def _flush_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
