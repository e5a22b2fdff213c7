"""Text that others wrote: decoded, and read as JSON or YAML, with one clear line for whatever is wrong.

Place in the flow: below all that reads small files (configurations, indexes, records, recipes, lines of
texts). A file is data: it cannot take more memory than its size allows, nothing in it is executed, and what
it holds is plain values of a bounded depth, so that nobody behind this module runs out of stack.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .inert import is_text

MOST_BYTES = 1 << 27
"""Largest JSON file: the record of a model with a hundred thousand matrices fits."""
MOST_YAML_BYTES = 1 << 20
MOST_DEPTH = 64
"""Lists and objects inside each other; what people write has ten."""
_MOST_DIGITS = 300  # of a whole number: longer ones do not fit a float
_MOST_VALUES = 100_000  # of a YAML document with its aliases written out
_MARKS = (  # the longer ones first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BRIEF = reprlib.Repr()  # of a huge list or text only the beginning is written out
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 200
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def decoded(content: bytes) -> str:
    """The text of a file: UTF-8, or what its byte order mark says (Windows writes one), without the mark.

    Raises:
        ValueError: it is neither.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"not {name} text (byte {error.start}: {error.reason})") from None


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a small file.

    Raises:
        ValueError: it is too large, no regular file, or cannot be read; begins with the path.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) > most:
        raise ValueError(f"{path}: more than {most:,} bytes")
    return content


def from_json(
    text: str | bytes,
    *,
    strict: bool = False,
    hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """The value of a JSON text.

    Args:
        strict: refuse what JSON itself does not have: a name twice in an object (else the last one counts, as
            everywhere), NaN and Infinity, bytes that are not plain UTF-8.
        hook: as `object_hook` of `json.loads`.

    Raises:
        ValueError: one line that says what is wrong.
    """
    if isinstance(text, bytes):
        text = text.decode() if strict else decoded(text)

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if strict and len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{short(twice)} appears twice")
        return hook(found) if hook else found

    options: dict[str, Any] = {"parse_constant": _no_number} if strict else {}
    if strict or hook:
        options["object_pairs_hook"] = unique
    try:
        value = json.loads(text, parse_int=_whole, **options)
        _refuse_deep(value, bool(_HALF_PAIR.search(text)))
    except RecursionError:
        raise ValueError(_too_deep()) from None
    return value


def from_yaml(text: str) -> Any:
    """The value of a YAML text; every scalar is a string, as written.

    Raises:
        ValueError: one line that says what is wrong, and in which line of the text: also a name twice in a
            mapping, and aliases that make it endless or huge.
    """
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"more than {MOST_YAML_BYTES:,} characters")
    try:
        node = yaml.compose(text, yaml.BaseLoader)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    except (yaml.YAMLError, OverflowError, ValueError) as error:  # "\UFFFFFFFF" is no character
        raise ValueError(f"not readable as YAML ({' '.join(str(error).split())})") from None
    return None if node is None else _plain(node, 1, [_MOST_VALUES])


def short(value: Any) -> str:
    """A value from a file, for an error message: no control characters, not long."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: BaseException) -> str:
    """What a library says of a file, for an error message: one line, not long."""
    return (str(error).strip() or repr(error)).split("\n")[0][:300]


def _too_deep() -> str:
    return f"nested too deeply; allowed: {MOST_DEPTH} lists and objects inside each other"


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits; allowed: {_MOST_DIGITS}")
    return int(digits)


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _refuse_deep(value: Any, halves: bool) -> None:
    """Refuse deep nesting, and (if there may be any) halves of a surrogate pair, which are no text."""
    level, depth = [value], 0
    while level:
        depth += 1
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
                inner += part.keys() if halves else ()
            elif isinstance(part, list):
                inner += part
            elif halves and isinstance(part, str) and not is_text(part):
                raise ValueError(f"not a Unicode text: an unpaired surrogate in {short(part)}")
        if inner and depth > MOST_DEPTH:
            raise ValueError(_too_deep())
        level = inner


def _plain(node: yaml.Node, depth: int, left: list[int]) -> Any:
    """The value of a node; `left`: how many values there may still be."""
    line = f"line {node.start_mark.line + 1}"
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {_MOST_VALUES:,} values after its aliases are expanded")
    if depth > MOST_DEPTH + 1:  # an alias of what it is in has no end
        raise ValueError(f"{line}: {_too_deep()}")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(part, depth + 1, left) for part in node.value]
    if not isinstance(node, yaml.MappingNode):
        if not is_text(node.value):
            raise ValueError(
                f"line {node.start_mark.line + 1}: an unpaired surrogate, which is not valid text"
            )
        return node.value
    found: dict[str, Any] = {}
    for key, value in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{line}: the name of a field is not a text")
        if key.value in found:
            raise ValueError(f"{line}: {short(key.value)} appears twice")
        found[key.value] = _plain(value, depth + 1, left)
    return found


def bytes_of(text: str, what: str) -> int:
    """The bytes of "6GB", "512 MiB" or a number of bytes.

    Args:
        what: name of the option, for the error message.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i)?B?", text.strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{what} is {short(text)}; allowed: a size such as 6GB or 512MiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
