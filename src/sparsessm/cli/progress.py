"""How far the work is, told on stderr: bars on a terminal, lines in a file, events for a program, or nothing.

Place in the flow: around the work of every command (answering.py). Call it with (stage, done, total, block);
use it as a context manager, so that the terminal is restored.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

from ..data.inert import visible
from .tables import console

LINE_SECONDS = 10.0  # at most one plain progress line in so many seconds
EVENT_SECONDS = 1.0  # and at most one event


class Progress(ABC):
    """What a command tells while it works.

    Attributes:
        doing: the step of the work that was reported last.
    """

    def __init__(self) -> None:
        self.doing = ""
        self._stage, self._done = "", 0
        self._begun = self._told = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(failed=kind is not None)

    @final
    def say(self, title: str) -> None:
        """Begin a step of the work; what is reported from now on belongs to it."""
        self._stage, self.doing = "", title
        self.begin(title)

    @final
    def __call__(self, stage: str, done: int, total: int, block: str) -> None:
        """So many of a stage's steps are done."""
        if stage != self._stage or done < self._done:  # a stage may start anew: one budget over all layers
            self._stage = stage
            self._begun = self._told = time.monotonic()
        self._done = done
        self.doing = self.doing or stage
        self.tell(stage, done, total, block)

    @final
    def waited(self, done: int, total: int, least: float) -> float | None:
        """Seconds since the stage began, if it is at its end or nothing was told for so long; else None."""
        now = time.monotonic()
        if done < total and now - self._told < least:
            return None
        self._told = now
        return now - self._begun

    @abstractmethod
    def start(self) -> None:
        """The work begins."""

    @abstractmethod
    def stop(self, failed: bool) -> None:
        """The work has ended."""

    @abstractmethod
    def note(self, line: str) -> None:
        """Tell what is no step of the work."""

    @abstractmethod
    def begin(self, title: str) -> None:
        """Tell that a step of the work begins."""

    @abstractmethod
    def tell(self, stage: str, done: int, total: int, block: str) -> None:
        """Tell how far a stage is."""

    @abstractmethod
    def restored(self) -> bytes:
        """What a terminal must be sent if the program ends now."""


@final
class Silent(Progress):
    """Nothing is told."""

    def start(self) -> None: ...

    def stop(self, failed: bool) -> None: ...

    def note(self, line: str) -> None: ...

    def begin(self, title: str) -> None: ...

    def tell(self, stage: str, done: int, total: int, block: str) -> None: ...

    def restored(self) -> bytes:
        return b""


@final
class Lines(Progress):
    """A line now and then."""

    def start(self) -> None: ...

    def stop(self, failed: bool) -> None: ...

    def note(self, line: str) -> None:
        console(sys.stderr).print(visible(line), soft_wrap=True)

    def begin(self, title: str) -> None:
        self.note(title)

    def tell(self, stage: str, done: int, total: int, block: str) -> None:
        spent = self.waited(done, total, LINE_SECONDS)
        if spent is None:
            return
        parts = [f"{stage}: {done} of {total}"]
        if done >= total:
            parts.append(f"{spent:.0f} s")
        else:
            parts += [block] if block else []
            parts += [f"{spent * (total - done) / done:.0f} s left"] if done else []
        self.note(", ".join(parts))

    def restored(self) -> bytes:
        return b""


@final
class Events(Progress):
    """A JSON object in each line, for programs (docs/api.md)."""

    def start(self) -> None: ...

    def stop(self, failed: bool) -> None: ...

    def note(self, line: str) -> None:
        self._send("note", text=line)

    def begin(self, title: str) -> None:
        self._send("step", text=title)

    def tell(self, stage: str, done: int, total: int, block: str) -> None:
        spent = self.waited(done, total, EVENT_SECONDS)
        if spent is not None:
            left = round(spent * (total - done) / done, 1) if done else None
            how = {"stage": stage, "done": done, "total": total, "block": block or None}
            self._send("progress", **how, seconds=round(spent, 1), left=left, memory=_resident() or None)

    def restored(self) -> bytes:
        return b""

    def _send(self, event: str, **what: Any) -> None:
        sys.stderr.write(json.dumps({"event": event, **what}) + "\n")
        sys.stderr.flush()


@final
class Bars(Progress):
    """Bars on a terminal, with the block, the time left and the memory in use."""

    def __init__(self, shown: Console) -> None:
        super().__init__()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[block]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
        )
        self._console, self._bar = shown, None
        self._bars = RichBars(*columns, console=shown, redirect_stdout=False)
        self._bar: TaskID | None

    def start(self) -> None:
        self._bars.start()

    def stop(self, failed: bool) -> None:
        if not failed:
            self._fill()
        self._bars.stop()

    def note(self, line: str) -> None:
        self._console.print(visible(line), soft_wrap=True)

    def begin(self, title: str) -> None:
        self._fill()
        # a moving bar until its length is known
        self._bar = self._bars.add_task(visible(title), total=None, block="", memory="")

    def tell(self, stage: str, done: int, total: int, block: str) -> None:
        if self._bar is None:
            self._bar = self._bars.add_task(visible(stage), block="", memory="")
        memory = f"{used / 1e9:.1f} GB" if (used := _resident()) else ""
        self._bars.update(self._bar, completed=done, total=total, block=block, memory=memory)

    def restored(self) -> bytes:
        return b"\n\x1b[?25h"  # bars hide the cursor

    def _fill(self) -> None:
        """Fill the bar of a step that reported nothing."""
        if self._bar is not None and self._bars.tasks[self._bar].total is None:
            self._bars.update(self._bar, completed=1, total=1)


def to_stderr(*, quiet: bool = False, events: bool = False) -> Progress:
    """What suits stderr: for a program, a terminal or a file."""
    if quiet:
        return Silent()
    if events:
        return Events()
    shown = console(sys.stderr)
    return Bars(shown) if shown.is_terminal else Lines()


def _resident() -> int:
    """Bytes that this process has in memory, 0 where the system does not say."""
    from ..checkpoint.memory import resident  # late: this file is imported before anything slow

    return resident()
