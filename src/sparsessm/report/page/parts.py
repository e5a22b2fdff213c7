"""What sections are made of: tables that sort, figures with their tables, key figures.

Place in the flow: between `markup.py` and the sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .markup import Content, Safe, tag
from .words import real


class Number(NamedTuple):
    """A cell that sorts by its value.

    Attributes:
        text: what is shown. value: what it is; None goes last.
    """

    text: str
    value: float | None


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Content | Number]],
    *,
    words: int = 1,
    remarks: bool = False,
    sorts: bool = True,
) -> Safe:
    """A table with a caption; the first cell of a row names it.

    Args:
        words: columns that are words, the first ones; the others are numbers.
        remarks: the last column is words, too.
        sorts: whether a reader may sort it, where it has several rows.
    """
    numbers = range(words, len(columns) - remarks)
    head = [
        tag("th", name, scope="col", class_="n" if place in numbers else None)
        for place, name in enumerate(columns)
    ]
    body = [tag("tr", *(_cell(cell, place, numbers) for place, cell in enumerate(row))) for row in rows]
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *head)),
        tag("tbody", *body),
        class_="sorts" if sorts and len(rows) > 2 else None,
    )
    return tag("div", inner, class_="wide", tabindex=0, role="region", aria_label=caption)


def _cell(cell: Content | Number, place: int, numbers: range) -> Safe:
    value, text = (cell.value, cell.text) if isinstance(cell, Number) else (None, cell)
    shown = None if (found := real(value)) is None else f"{found:.9g}"
    kind = "n" if place in numbers else None
    if place == 0:
        return tag("th", text, scope="row", data_value=shown)
    return tag("td", text, class_=kind, data_value=shown)


def section(name: str, title: str, *content: Content) -> Safe:
    """A part of the page under a heading of its own; `name` is its id."""
    return tag(
        "section",
        tag("h2", title, id=f"{name}-heading"),
        *content,
        aria_labelledby=f"{name}-heading",
        id=name,
    )


def picture(drawn: Safe | None, caption: str, *, alone: bool = False) -> Safe | None:
    """A picture with what it shows; None where there is none.

    Args:
        alone: it takes the whole width of a wide screen.
    """
    return drawn and tag("figure", drawn, tag("figcaption", caption), class_="alone" if alone else None)


def pictures_of(*drawn: tuple[Safe | None, str]) -> Safe:
    """Pictures with their captions, two in a row; one that is left over is alone."""
    there = [(one, caption) for one, caption in drawn if one]
    odd = len(there) % 2
    made = [
        picture(one, caption, alone=bool(odd) and place == len(there))
        for place, (one, caption) in enumerate(there, 1)
    ]
    return tag("div", *made, class_="figures")


def folded(title: str, *content: Content) -> Safe:
    """What a reader may open."""
    return tag("details", tag("summary", title), *content)


def listed(items: Sequence[Content]) -> Safe | None:
    """A list; None of nothing."""
    return tag("ul", *(tag("li", item) for item in items)) if items else None


def key_figure(name: str, value: str, below: str, tone: str = "") -> Safe:
    """One large number with its name and what stands behind it."""
    return tag(
        "div",
        tag("dt", name),
        tag("dd", tag("span", value, class_="value"), tag("span", below, class_="below")),
        class_=f"key {tone}".strip(),
    )
