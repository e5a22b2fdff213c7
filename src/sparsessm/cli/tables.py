"""What a person sees in the end: tables on the terminal. Only `cli` uses it.

Place in the flow: after everything. Tables are built from the plain values of records; nothing is computed
here but shares.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..data.inert import visible

FILE_WIDTH = 120  # columns when the output is not a terminal


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
