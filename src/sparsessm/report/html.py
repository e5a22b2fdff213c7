"""A table as HTML, for notebooks: what `Report` and `Perplexity` show where the last line of a cell is one.

Place in the flow: beside record.py, whose tables it draws. Names of tensors, files and texts are in it, so
every cell is escaped, and its control characters are written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .page.markup import tag


def html_table(title: str, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """One `<table>` with the title as its caption; a line of cells may be shorter than the columns."""
    lines = [tag("tr", *(tag("th", name) for name in columns))]
    lines += [tag("tr", *(tag("td", cell) for cell in row)) for row in cells]
    return tag("table", tag("caption", title), *lines).html
