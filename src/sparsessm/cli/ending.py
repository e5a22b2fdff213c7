"""How the program ends: a signal, a full disk, too little memory, a bug, or the end of the work.

Place in the flow: around everything else, and imported before anything slow, so that it holds from the first
import to the exit. Exit codes: 0, 1 a mistake of the user or a failure (one line `error: ...`), 2 wrong
usage, 3 no size keeps to the limits of `fit`, 128 + the signal (Ctrl-C 130, SIGTERM 143, SIGHUP 129).

A signal does not raise an exception: it would come in a destructor, an import hook or a native call that was
converting its arguments, which swallow it. The handler clears up what is unfinished (`data/unfinished.py`),
looks what is on the disk, says it in one line and ends the process.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import Any, NamedTuple

from ..data import unfinished
from ..data.inert import is_text, visible
from ..runtime.threads import MOST_THREADS
from . import ranks, streams

GRACE = 5.0  # seconds, for what libraries do at the end
TRACEBACK = "SPARSESSM_TRACEBACK"  # set to 1: how a bug came about is printed
# Numbers of threads that libraries read from the environment, and whether 0 means "as many as there are".
THREADS = {
    "OMP_NUM_THREADS": False,
    "MKL_NUM_THREADS": True,
    "OPENBLAS_NUM_THREADS": True,
    "RAYON_NUM_THREADS": True,
}
_SHORT = (  # how libraries say that there is no memory, in classes that say nothing
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "failed to map segment",
    "unable to mmap",
    "could not create a memory object",
)
HELPS = {
    "prune": "fewer --samples, a shorter --length or --no-eval need less",
    "fit": "fewer --samples, a shorter --length or less --memory need less",
    "analyze": "fewer --samples and --windows or a shorter --length need less",
    "demo": "fewer --samples need less",
    "eval": "a shorter --length needs less",
    "generate": "a shorter prompt or a model packed with --dtype int8 needs less",
    "bench": "a model packed with --dtype int8 needs less",
    "report": "--no-eval needs less",
}


class _Seen(NamedTuple):
    """A target as it was when the command began.

    Attributes:
        path: as the user wrote it.
        grown: a file that grows while the command works, and that the same command goes on from.
        before: which file or directory was there, None if there was none.
    """

    path: str
    grown: bool
    before: tuple[int, ...] | None


_owner = 0  # the process whose end this is; a forked one just ends
_targets: list[_Seen] = []
_nothing = "nothing was written"
_kept: Path | None = None  # the directory of an unfinished run, for `--resume`
_events = False  # stderr is read by a program
_worked = False  # the command has done its work, and its result is on the disk
_restored: list[Callable[[], bytes]] = []
_reserve: list[bytearray] = []  # given up where there is no memory, so that this can still be said


def begin() -> None:
    """Take over signals, streams and what nobody can catch; once, before anything is imported."""
    global _owner
    _owner = os.getpid()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name)
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup keeps what it asked for
            signal.signal(number, _stop)
    streams.prepare()
    _reserve.append(bytearray(1 << 20))
    if not os.environ.get(TRACEBACK):
        sys.unraisablehook = lambda _: None  # in destructors, of what has been said or is of no use
    # before transformers is imported: its bars and advice are not ours, and stdout is for results
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def refuse_surroundings(arguments: Sequence[str]) -> None:
    """Refuse what would end the process, or the last step, in a library.

    Raises:
        ValueError: an argument that is not UTF-8, or an environment that asks for too many threads.
    """
    for argument in arguments:
        if not is_text(argument):
            raise ValueError(
                f"argument '{argument}' is not UTF-8; rename the file, because names are written to JSON"
            )
    for name, zero in THREADS.items():
        text = os.environ.get(name, "").strip()
        counts = text.split(",") if name == "OMP_NUM_THREADS" else [text]  # one for each nested level
        if text and not all(_is_count(count.strip(), zero) for count in counts):
            raise ValueError(
                f"the environment has {name}={text!r}; allowed: a whole number from 1 to {MOST_THREADS} "
                f"(this machine has {os.cpu_count()} processors)"
            )


def _is_count(text: str, zero: bool) -> bool:
    return text.isdecimal() and text.isascii() and len(text) < 10 and 1 - zero <= int(text) <= MOST_THREADS


def run(command: Callable[[], Any]) -> int:
    """Run the command; returns the exit code. Whatever goes wrong is one line on stderr."""
    try:
        refuse_surroundings(sys.argv)
        return command() or 0
    except SystemExit as error:
        if _worked:  # rich ends the program where nobody reads any more; the result is on the disk
            return 0
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        if _worked and isinstance(error, OSError):  # of the printing of what is on the disk already
            sys.stderr.write(
                _told("note", f"what was done could not be printed ({error.strerror}); {there_now()}")
            )
            return 0
        try:
            return said(error)
        except BaseException:  # not even room for the words
            os.write(2, b"error: out of memory\n")
            return 1


def said(error: BaseException, doing: str = "") -> int:
    """Say on stderr, in one line, what an exception means for the user; returns the exit code.

    Args:
        doing: the step of the work.
    """
    _reserve.clear()
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write(_told("interrupted", there_now()))
        return 130
    if isinstance(error, BrokenPipeError):  # whoever read stdout has gone, as `head` does
        return 1
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    told, kept = words(error, doing), kept_now()
    if kept and "--resume" not in told:
        told = f"{told}; {kept}"
    sys.stderr.write(_told("error", visible(" ".join(told.split()))))
    sys.stderr.flush()
    return 1


def _told(event: str, text: str) -> str:
    """A last line, for people or for a program."""
    if ranks.count() > 1:
        text = f"process {ranks.number()}: {text}"
    if _events:
        return json.dumps({"event": event, "text": text}) + "\n"
    return f"{event}{';' if event == 'interrupted' else ':'} {text}\n"


def words(error: BaseException, doing: str = "") -> str:
    """What an exception means for the user: a mistake, too little memory, or a bug of ours with its place."""
    if is_shortage(error):
        helps = next((HELPS[word] for word in sys.argv[1:] if word in HELPS), "a smaller model needs less")
        return f"out of memory{f' while working on: {doing}' if doing else ''}; {helps}"
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    where, trace = "", error.__traceback__
    while trace:
        where, trace = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
    told = f"{type(error).__name__}: {str(error)[:300]}".removesuffix(": ")
    return f"this is a bug: {told}{where}; {TRACEBACK}=1 in the environment shows how it came about"


def is_shortage(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that there is no memory."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if any(short in str(error).lower() for short in _SHORT):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def writing(
    *paths: str | os.PathLike[str] | None,
    grown: bool = False,
    nothing: str = "",
    kept: Path | None = None,
    events: bool = False,
) -> Iterator[None]:
    """Note what is there before the work, so that the truth can be told if it is cut short.

    Args:
        paths: what the command writes.
        grown: files that grow while the command works.
        nothing: what to say of a command that writes nothing.
        kept: the directory that keeps what is done, for `--resume`.
        events: the end is told as a JSON object, too.
    """
    global _nothing, _worked, _kept, _events
    _worked, _kept, _events = False, kept, events
    _targets[:] = [
        _Seen(os.fspath(path), grown, _identity(path, grown)) for path in paths if path is not None
    ]
    _nothing = nothing or "nothing was written"
    yield
    _worked = bool(_targets)


def there_now() -> str:
    """What is on the disk, compared with what was there when the command began."""
    told, same = [], []
    for seen in _targets:
        now = _identity(seen.path, seen.grown)
        if now == seen.before:
            same += [] if now is None else [seen.path]
        elif now is None:
            told.append(f"{seen.path} is gone")
        elif seen.grown:
            told.append(f"what is in {seen.path} is kept, the same command goes on")
        else:
            told.append(f"{seen.path} is complete" + (", in place of the old one" if seen.before else ""))
    if kept := kept_now():
        told.append(kept)
    if not told:
        told.append(_nothing)
    if same:
        told.append(f"{' and '.join(same)} {'is as it was' if len(same) == 1 else 'are as they were'}")
    return visible("; ".join(told))


def kept_now() -> str:
    """Where what is done is kept, and how to go on; empty if nothing is."""
    if _kept is None or not _kept.is_dir():
        return ""
    shown = min(str(_kept), os.path.relpath(_kept), key=len)
    return f"what is done is kept in {shown}: the same command with --resume goes on"


def _identity(path: str | os.PathLike[str], grown: bool) -> tuple[int, ...] | None:
    """Which file or directory a path names, with its age if it is changed in place."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino, *((found.st_mtime_ns, found.st_size) if grown else ()))


@contextmanager
def restoring(restored: Callable[[], bytes]) -> Iterator[None]:
    """Where the program ends inside of the block, send what this gives to the terminal."""
    _restored.append(restored)
    try:
        yield
    finally:
        _restored.remove(restored)


def _stop(number: int, frame: FrameType | None) -> None:
    """The handler of signals. A second one must not disturb the clearing up, but may end the saying."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if os.getpid() != _owner:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    line = ""
    try:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        unfinished.clear()
        line = _told("interrupted", there_now())
        before = b"".join(restored() for restored in _restored)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, before + line.encode(errors="backslashreplace"))
    finally:
        os._exit(128 + number)


def at_once(error: BaseException) -> None:
    """End the process with an error, from a thread beside the one that works, which may never come back."""
    try:
        unfinished.clear()
        os.write(2, b"".join(restored() for restored in _restored))
        late = Timer(GRACE, os._exit, [1])  # where a library waits for the work to end
        late.daemon = True
        late.start()
        finish(said(error))
    finally:
        os._exit(1)


def finish(code: int) -> None:
    """End the process: what others want done at its end is done, and then nothing is left that could fail."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        pass  # whatever was printed has been flushed, or its failure has been said
    os._exit(code)
