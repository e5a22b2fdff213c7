"""What a person sees: progress on the terminal, and the closing tables. Only `cli` uses it.

Place in the flow: after everything. Tables are built from the plain values of records; nothing is computed
here but shares.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.columns import Columns
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from ..data.inert import visible

LINE_SECONDS = 10.0  # at most one plain progress line in so many seconds
FILE_WIDTH = 120  # columns when the output is not a terminal


class Progress:
    """Progress on stderr: bars with the time left on a terminal, plain lines elsewhere, nothing if `quiet`.

    Call it with (stage, done, total); use it as a context manager so that the terminal is restored.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = console(sys.stderr)
        self._quiet = quiet
        self._bars: Bars | None = None
        self._bar: TaskID | None = None
        self._stage, self._step, self._done = "", "", 0
        self._begun = self._printed = 0.0
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]}"),
            )
            self._bars = Bars(*columns, console=self._console, redirect_stdout=False)

    @property
    def doing(self) -> str:
        """The step of the work that was reported last."""
        return self._step or self._stage

    def restored(self) -> bytes:
        """What a terminal must be sent if the program ends now: bars hide the cursor."""
        return b"\n\x1b[?25h" if self._bars else b""

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            if kind is None:
                self._finish()
            self._bars.stop()

    def note(self, line: str) -> None:
        """Print a line that is no step of the work."""
        if not self._quiet:
            self._console.print(visible(line), soft_wrap=True)

    def say(self, title: str) -> None:
        """Begin a step of the work; what is reported from now on belongs to it."""
        self._stage, self._step = "", title
        if self._bars:
            self._finish()
            # a moving bar until its length is known
            self._bar = self._bars.add_task(visible(title), total=None, memory="")
        else:
            self.note(title)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or done < self._done:  # a stage may start anew: one budget over all layers
            self._stage = stage
            self._begun = self._printed = time.monotonic()
        self._done = done
        if self._bars:
            self._bar = self._bars.add_task(visible(stage), memory="") if self._bar is None else self._bar
            self._bars.update(self._bar, completed=done, total=total, memory=in_memory())
        elif not self._quiet:
            self._line(stage, done, total)

    def _line(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        spent = now - self._begun
        if done >= total:
            rest = f"{spent:.0f} s"
        elif done and now - self._printed >= LINE_SECONDS:
            rest = f"{spent * (total - done) / done:.0f} s left"
        else:
            return
        self._printed = now
        self.note(f"{stage}: {done} of {total}, {rest}")

    def _finish(self) -> None:
        """Fill the bar of a step that reported nothing."""
        if self._bars and self._bar is not None and self._bars.tasks[self._bar].total is None:
            self._bars.update(self._bar, completed=1, total=1)


def in_memory() -> str:
    """What this process has in memory, for people; empty where the system does not say."""
    from ..checkpoint.memory import resident  # late: this file is imported before anything slow

    return f"{used / 1e9:.1f} GB" if (used := resident()) else ""


def console(stream: TextIO) -> Console:
    """A console on a stream that shows text as it is. On stderr nothing that fails ends the work."""
    file = getattr(stream, "styled", stream)  # of cli/streams.py, where the program runs as one
    return Console(file=file, highlight=False, markup=False, emoji=False)


def echo(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print text as it is, its control characters made visible, on stdout or stderr.

    Raises:
        OSError: stdout cannot be written to.
    """
    stream = sys.stderr if err else sys.stdout
    stream.write(visible(text, allowed="\n\t") + end)
    stream.flush()


def show(*parts: Group | str) -> None:
    """Print on stdout, as wide as the terminal, or `FILE_WIDTH` columns in a file or pipe.

    Raises:
        OSError: stdout cannot be written to.
    """
    shown = console(sys.stdout)
    if not shown.is_terminal:
        shown.width = FILE_WIDTH
    for part in parts:
        shown.print(visible(part, allowed="\n") if isinstance(part, str) else part)


def table(title: str, columns: Iterable[str], cells: Iterable[Iterable[str]], left: int = 1) -> Group:
    """A titled table of text cells; the first `left` columns are words, the others numbers."""
    result = Table()
    for number, column in enumerate(columns):
        justify = "left" if number < left else "right"
        result.add_column(visible(column), justify=justify, overflow="fold")
    for line in cells:
        result.add_row(*map(visible, line))
    return Group(
        Text(visible(title), style="bold"), result
    )  # a Table's own title would wrap at the table's width


def heat_maps(
    maps: Iterable[tuple[str, Sequence[str], Sequence[str], Sequence[Sequence[float | None]]]],
    bounds: tuple[float, float],
    written: Callable[[float], str],
) -> Group:
    """Tables of numbers whose backgrounds go from green to red on one logarithmic scale, side by side.

    Args:
        maps: (title, names of the layers, of the columns, values [layer][column]; None: nothing there) each.
        bounds: least and greatest value of the scale, above 0.
        written: a number as text.
    """
    low, high = (math.log(bound) for bound in bounds)
    parts = []
    for title, rows, columns, values in maps:
        result = Table()
        result.add_column("layer")
        for column in columns:
            result.add_column(visible(column), justify="right")
        for row, line in zip(rows, values, strict=True):
            cells = [
                Text("-") if value is None else Text(written(value), _heated(value, low, high))
                for value in line
            ]
            result.add_row(visible(row), *cells)
        parts.append(Group(Text(visible(title), style="bold"), result))
    return Group(Columns(parts, padding=(0, 2)))


def _heated(value: float, low: float, high: float) -> str:
    """A style: green, yellow, red, light enough for black letters."""
    heat = 0.0 if value <= 0 else min(max((math.log(value) - low) / (high - low), 0.0), 1.0)
    red, green = round(255 * min(1.0, 0.55 + 0.9 * heat)), round(255 * min(1.0, 1.35 - 0.9 * heat))
    return f"black on rgb({red},{green},120)"
