"""The only place where text becomes HTML: elements are made here, and nothing that is given can make one.

Place in the flow: below all other files of the page. Text and attributes may come from anywhere (names of
tensors and files, windows of text): controls and what turns the direction of writing are written out
(`data/inert.py`), what HTML would read as markup is escaped. An element is a `Safe`, and only this file
makes one.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ...data.inert import visible

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9:-]*")
_EMPTY = frozenset({"meta", "br", "hr"})
_NO_CHARACTER = re.compile("[\ufdd0-\ufdef\ufeff\ufff9-\ufffb" + "".join(
    f"{chr(plane * 0x10000 + 0xFFFE)}{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(17)
) + "]")  # fmt: skip


@dataclass(frozen=True)
class Safe:
    """Markup that was made by this file."""

    html: str


Content: TypeAlias = "Safe | str | int | float | None | Iterable[Content]"


def plain(text: str, allowed: str = "") -> str:
    r"""Text without what a reader could not see: controls, and code points that are no characters, as \u....

    Args:
        allowed: controls that stay.
    """
    shown = visible(text, allowed)
    return _NO_CHARACTER.sub(lambda found: ascii(found[0])[1:-1], shown)


def tag(
    name: str, /, *content: Content, keep: str = "", **attributes: str | int | float | bool | None
) -> Safe:
    """An element.

    Args:
        name: of the element, written by us.
        content: text, which is escaped, or elements.
        keep: controls that stay in its text, such as a newline in a `pre`.
        attributes: `_` ends a name that Python has ("class_") and stands for "-" inside; None and False are
            left out, True has no value.

    Raises:
        ValueError: a name of an element or attribute that is none, an attribute that could run or fetch.
    """
    _refuse_odd(name)
    parts = [name]
    for word, value in attributes.items():
        attribute = word.rstrip("_").replace("_", "-")
        _refuse_odd(attribute)
        text = str(value)
        fetches = attribute in ("href", "src", "srcset", "action", "data", "xlink:href", "formaction")
        if attribute.startswith("on") or attribute == "style" or (fetches and not text.startswith("#")):
            raise ValueError(f"attribute {attribute!r} is {text!r}; the page runs and fetches nothing")
        if value is True:
            parts.append(attribute)
        elif value is not None and value is not False:
            parts.append(f'{attribute}="{html.escape(plain(text))}"')
    opened = f"<{' '.join(parts)}>"
    return Safe(opened if name in _EMPTY else f"{opened}{_inside(content, keep)}</{name}>")


def together(*content: Content) -> Safe:
    """Elements and text one after the other."""
    return Safe(_inside(content, ""))


def raw(name: str, source: str, /, **attributes: str) -> Safe:
    """A `style` or `script` of ours, whose source is not escaped.

    Raises:
        ValueError: another element, or a source that would end it.
    """
    if name not in ("style", "script") or "</" in source or "<!--" in source:
        raise ValueError(f"{name}: not a style or script of the page")
    empty = tag(name, **attributes).html
    return Safe(empty.replace("></", f">{source}</", 1))


def document(head: Iterable[Safe], body: Iterable[Safe]) -> str:
    """A whole page in English."""
    inner = tag("html", tag("head", *head), tag("body", *body), lang="en", dir="ltr")
    return f"<!doctype html>\n{inner.html}\n"


def _inside(content: Iterable[Content], keep: str) -> str:
    return "".join(_one(part, keep) for part in content)


def _one(part: Content, keep: str) -> str:
    if part is None:
        return ""
    if isinstance(part, Safe):
        return part.html
    if isinstance(part, str | int | float):
        return html.escape(plain(str(part), keep))
    return _inside(part, keep)


def _refuse_odd(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an element or attribute")
