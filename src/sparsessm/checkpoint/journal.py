"""What a run has done, on the disk beside its result: how a killed run goes on (`docs/large-models.md`).

The directory `OUT.unfinished` belongs to one run that writes `OUT`:

    journal.jsonl       first what the run is, then a line for each thing done; a line counts when it is whole
    NNNNN.safetensors   the blocks that were changed (`streamed.py` writes them)
    value-N.safetensors the tensors of line N
    states-*            the hidden states that the walk carries: two files that take turns, so that what was
                        before a block lasts until the block is done

Each line tells the checksums of the files that it speaks of. What was interrupted between two lines is done
again. Nothing in it is executed: plain values are JSON, tensors are safetensors.

Where several processes work on a run, the first one writes and all read; of the hidden states each maps the
whole file and writes those of its own windows. So a run goes on with any number of processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ..architectures import Block, Residence
from ..architectures.on_device import OnDevice
from ..architectures.ranks import here
from ..data.unfinished import undoing
from .atomic import flush_directory
from .container import checksum
from .files import open_safetensors, write_one
from .journal_lines import FILE, FORMAT, difference, filled, plain, read
from .streamed import Streamed

SUFFIX = ".unfinished"


@contextmanager
def unfinished(
    out: str | os.PathLike[str], *, resume: bool = False, force: bool = False
) -> Iterator[Journal]:
    """The journal of a run that writes `out`. It stays where the block ends before the run, if anything is
    done; `clear` it when the result is there.

    Args, Raises: as `Journal`.
    """
    journal: Journal | None = None

    def close() -> None:
        if journal is not None:
            journal.close()

    with undoing(close):
        journal = Journal(out, resume=resume, force=force)
        yield journal


def folder_of(out: str | os.PathLike[str]) -> Path:
    """Where a run that writes `out` keeps what it has done."""
    target = Path(out).resolve()
    return target.with_name(target.name + SUFFIX)


@final
class Journal:
    """Of one run; a `calibration.journal.Journal`.

    Attributes:
        folder: the directory. resumed: whether it held something of an earlier run. before: what that was.
    """

    def __init__(self, out: str | os.PathLike[str], *, resume: bool = False, force: bool = False) -> None:
        """Make the directory, or go on in it.

        Args:
            out: the directory of the result. resume: go on with what is there. force: replace what is there.

        Raises:
            ValueError: there is something, and neither `resume` nor `force`; another process works there; or
                what is there is of somebody else, damaged, or of another version.
            OSError: it cannot be made.
        """
        self.folder = folder_of(out)
        self._result = Path(out).resolve(), _identity(Path(out).resolve())
        self._ranks = here()
        self._lines: list[dict[str, Any]] = []
        self._parents: list[Path] = []
        self._lock: int | None = None
        if self._ranks.first:
            self._make(resume=resume, force=force)
        self._lines = self._ranks.given(self._lines)
        self.resumed = bool(self._lines)
        self.before: dict[str, Any] = self._lines[0] if self._lines else {}
        self._spent: float = self._lines[-1].get("seconds", 0.0) if self._lines else 0.0
        self._began: float | None = None
        self._residence: Streamed | None = None

    def _make(self, *, resume: bool, force: bool) -> None:
        there = os.path.lexists(self.folder)
        if there and not _ours(self.folder):
            raise ValueError(
                f"{str(self.folder)!r} is in the way: it is no unfinished run; rename it, or choose another "
                "name for the result"
            )
        if there and not resume and not force and (held := said(self.folder)):
            raise ValueError(
                f"{str(self.folder)!r} holds an unfinished run ({held}); go on with it (--resume), or "
                "replace it (--force)"
            )
        self._parents = [path for path in self.folder.parents if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"{str(self.folder)!r}: another process works there; wait for it") from None
        except OSError:  # a file system without locks
            pass
        if there and resume:
            self._lines = read(self.folder / FILE)
        elif there:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def seconds(self) -> float:
        """Of work, that of the runs before included."""
        return self._spent + (0.0 if self._began is None else time.perf_counter() - self._began)

    def start(self) -> None:
        """The work that is counted begins."""
        self._began = time.perf_counter()

    @property
    def worth(self) -> bool:
        """Whether anything is done that would be lost."""
        return len(self._lines) > 1

    def holds(self, residence: Residence) -> None:
        """Whose changed blocks are in the directory."""
        held = residence.inner if isinstance(residence, OnDevice) else residence
        assert isinstance(held, Streamed) and held.folder == self.folder
        self._residence = held

    def begin(self, what: Mapping[str, Any]) -> None:
        """Say what the run is, before anything else.

        Args:
            what: by name, plain values; "machine" may differ.

        Raises:
            ValueError: the run before was another one, or the first process's is; names in what.
        """
        what = json.loads(json.dumps({"format": FORMAT, **what}))
        first = self._ranks.given(what)
        for name in what:
            if name != "machine" and first[name] != what[name]:
                told = difference(name, first[name], what[name])
                raise ValueError(f"process {self._ranks.number} has another run than the first one: {told}")
        if not self._lines:
            self._add(what)
            return
        before = self.before
        if changed := [name for name in what if name != "machine" and before.get(name) != what[name]]:
            told = "; ".join(difference(name, before.get(name), what[name]) for name in changed)
            raise ValueError(
                f"{str(self.folder)!r} is the unfinished run of something else: {told}; give what was given "
                "then, or begin anew (--force)"
            )

    def room(self, states: int, others: int) -> int:
        """Bytes that its directory will take more than now.

        Args:
            states: entries of the hidden states of all windows. others: bytes of all else.
        """
        if not self._ranks.first:
            return 0
        now = sum(path.stat().st_size for path in self.folder.iterdir())
        return max(0, 16 * states + others - now)  # of two models, twice each

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        for line in self._lines[1:]:
            if line.get("value") == name:
                return self._value(line)
        made = self._ranks.given(make())
        self._add({"value": name, **self._kept(made)})
        return made

    def held(self, name: str) -> bool:
        return any(line.get("value") == name for line in self._lines[1:])

    def stage(self, name: str) -> _Stage:
        assert self._residence is not None, "holds comes first"
        for path in self.folder.glob("states-*") if self._ranks.first else ():
            if not path.name.startswith(f"states-{name}-"):  # of a walk that has come to its end
                path.unlink(missing_ok=True)
        lines = [line for line in self._lines[1:] if line.get("stage") == name]
        return _Stage(self, name, lines, self._residence)

    def clear(self) -> None:
        """Remove the directory: the result is there, or nothing was done."""
        if not self._ranks.first:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._parents:  # those that hold the result, or something of others, stay
            with suppress(OSError):
                parent.rmdir()

    def close(self) -> None:
        """Nothing more is done here; what is worth nothing goes, so does all when the result is there."""
        out, before = self._result
        if not self.worth or _identity(out) not in (None, before):
            self.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _add(self, line: Mapping[str, Any]) -> None:
        """A line is on the disk when this returns, and the files that it speaks of before it."""
        if self._ranks.first:
            with open(self.folder / FILE, "ab") as file:
                file.write(json.dumps({**line, "seconds": round(self.seconds, 3)}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            flush_directory(self.folder)  # of this file, and of those that the line speaks of
        self._lines.append(dict(line))

    def _kept(self, what: Any) -> dict[str, Any]:
        """A value as fields of a line; its tensors are in a file."""
        tensors: list[Tensor] = []
        told = plain(what, tensors)
        if not tensors or not self._ranks.first:
            return {"content": told}
        file = self.folder / f"value-{len(self._lines)}.safetensors"
        write_one(file, {str(i): tensor.contiguous() for i, tensor in enumerate(tensors)}, {})
        return {"content": told, "file": file.name, "checksum": flushed(file)}

    def _value(self, line: Mapping[str, Any]) -> Any:
        if "file" not in line:
            return line["content"]
        file = self.folder / line["file"]
        _refuse_damaged(file, line["checksum"])
        with open_safetensors(file) as content:
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}
        return filled(line["content"], tensors)


@final
class _Stage:
    """A walk of a run, as `calibration.journal.Stage` says."""

    def __init__(
        self,
        journal: Journal,
        name: str,
        lines: Sequence[Mapping[str, Any]],
        residence: Streamed,
    ) -> None:
        self._journal, self._name, self._residence = journal, name, residence
        self._left = {line["block"]: line for line in lines if "block" in line}
        self.left: Mapping[int, Any] = {index: journal._value(line) for index, line in self._left.items()}
        self._began: dict[str, dict[str, Any]] = {}
        for line in lines:  # the last word on each of the states
            self._began |= line["states"]
        self._places: dict[str, list[Tensor]] = {}

    def places(
        self, name: str, like: Tensor, shape: Sequence[int], mine: slice
    ) -> tuple[list[Tensor], int | None]:
        folder, ranks = self._journal.folder, self._journal._ranks
        files = [self._file(name, number) for number in (0, 1)]
        began = self._began.get(name)
        if began is not None and not all(file.is_file() for file in files):
            raise ValueError(f"{files[0]}: the hidden states have gone; begin anew (--force)")
        if not ranks.first:  # which makes them
            ranks.wait()
        self._places[name] = [self._residence.mapped.tensor(folder, shape, file) for file in files]
        if ranks.first:
            ranks.wait()
        own = [states[mine] for states in self._places[name]]
        if began is None:
            return own, None
        which = began["place"]
        if ranks.first and (found := _checksum_in(files[which])) != began["checksum"]:
            told = f"their checksum is {found}, the journal says {began['checksum']}"
            raise ValueError(f"{files[which]}: the hidden states are damaged: {told}; begin anew (--force)")
        return own, which

    def placed(self, name: str, which: int) -> None:
        self._journal._add({"stage": self._name, "states": self._told({name: which})})

    def leave(self, block: Block, note: Any, which: Mapping[str, int]) -> None:
        told = self._told(which)
        line = {"stage": self._name, "block": block.index, **self._journal._kept(note)}
        if self._residence.changed(block) and self._journal._ranks.first:
            line |= {"weights": flushed(self._residence.file(block))}
        self._journal._add(line | {"states": told})

    def tensors(self, block: Block) -> Mapping[str, Tensor]:
        line, file = self._left[block.index], self._residence.file(block)
        if "weights" not in line:
            return {}
        _refuse_damaged(file, line["weights"])
        with open_safetensors(file) as content:
            return {name: content.get_tensor(name).float() for name in content.keys()}

    def restore(self, block: Block) -> None:
        line = self._left[block.index]
        if "weights" in line:
            _refuse_damaged(self._residence.file(block), line["weights"])
            self._residence.adopt(block)

    def _file(self, name: str, place: int) -> Path:
        """Of hidden states."""
        return self._journal.folder / f"states-{self._name}-{name}-{place}"

    def _told(self, which: Mapping[str, int]) -> dict[str, Any]:
        for name, place in which.items():
            states = self._places[name][place]
            self._residence.mapped.flush(states)
            self._residence.release(states)  # and not through the mapping: that would take them into memory
        ranks = self._journal._ranks
        ranks.wait()  # for the states of all, and for the weights, which the first one wrote
        if not ranks.first:
            return {}
        return {
            name: {"place": place, "checksum": _checksum_in(self._file(name, place))}
            for name, place in which.items()
        }


def _ours(folder: Path) -> bool:
    """Whether a directory is that of a run, or empty: a slip must not take somebody's files."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return (folder / FILE).is_file() or not any(folder.iterdir())


def _identity(path: Path) -> tuple[int, int] | None:
    """Which directory a path names."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def said(folder: Path) -> str:
    """How far a run is, in words; empty where nothing is done that would be lost."""
    try:
        lines = read(folder / FILE)
    except ValueError as error:
        return str(error)
    blocks = len({(line["stage"], line["block"]) for line in lines[1:] if "block" in line})
    size = sum(path.stat().st_size for path in folder.iterdir())
    done = f"{blocks} blocks" if blocks else f"{len(lines) - 1} steps"
    return f"{done} done, {size:,} bytes" if len(lines) > 1 else ""


def flushed(file: Path) -> str:
    """The checksum of a file that is on the disk when this returns."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())
    return _checksum_in(file)


def _checksum_in(file: Path) -> str:
    with open(file, "rb", buffering=0) as content:
        return checksum(iter(lambda: content.read(1 << 24), b""))


def _refuse_damaged(file: Path, expected: str) -> None:
    try:
        found = _checksum_in(file)
    except OSError as error:
        raise ValueError(f"{file}: not readable ({error}); begin anew (--force)") from error
    if found != expected:
        told = f"its checksum is {found}, the journal says {expected}"
        raise ValueError(f"{file}: it is damaged: {told}; begin anew (--force)")
