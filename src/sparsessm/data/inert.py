"""Text of files and names, made harmless for whoever shows it: a terminal, a log, a model card.

A tensor may be called what it likes, and a terminal obeys what it is sent: colours, a new title, a cleared
screen, a full clipboard. Everything printed passes `visible`, which shows such characters instead of sending
them. Used by `tables`, `cli/` and `card`.
"""

from __future__ import annotations

import re

# C0 and C1 controls, line separators, what turns the direction of writing (arXiv 2111.00169), what no
# terminal shows at all (tags), and halves of characters: bytes of a file name that are not UTF-8.
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)


_SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(name: str) -> bool:
    """Whether a name can be written down: the bytes of a file's name need not be UTF-8."""
    return not _SURROGATE.search(name)


def visible(text: str, allowed: str = "") -> str:
    r"""The text with its control characters written out: ESC as \x1b, a byte that is no UTF-8 as \xff.

    Args:
        text: anything.
        allowed: controls that stay, such as a newline.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in allowed else _written(ord(found[0])), text)


def _written(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a name that is not UTF-8 (PEP 383)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
