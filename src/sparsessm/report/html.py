"""A table as HTML, for notebooks: what `Report` and `Perplexity` show where the last line of a cell is one.

Place in the flow: beside record.py, whose tables it draws. Names of tensors, files and texts are in it, so
every cell is escaped, and its control characters are written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..data.inert import visible


def html_table(title: str, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """One `<table>` with the title as its caption; a line of cells may be shorter than the columns."""
    lines = [_line("th", columns), *(_line("td", row) for row in cells)]
    return f"<table><caption>{_safe(title)}</caption>{''.join(lines)}</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_safe(cell)}</{tag}>' for cell in cells)}</tr>"


def _safe(text: str) -> str:
    return escape(visible(text))
