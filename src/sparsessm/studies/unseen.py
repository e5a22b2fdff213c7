"""Which windows of a text a search is judged on, and which it never sees.

Place in the flow: before `fit.py` measures anything. A named text has a side of its own for evaluation; a
user's file has not, so every window that shares tokens with a calibration window is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEARCHED = 32  # windows that every size is measured on, at most
VERIFIED = 48  # and others, for the chosen one: more, so that its interval is the narrower one
FEWEST = 2  # of each: one window has no interval
_HEAD = 8  # tokens by which a window is found


def parted(windows: Tensor, calibration: Tensor | None) -> list[Tensor]:
    """Numbers of the windows to search on and of those to verify on: disjoint, both spread over the text.

    Args:
        windows: (W, L) int64, all of a text, one behind the other. calibration: (N, M) int64.

    Raises:
        ValueError: too few windows are left.
    """
    free = torch.arange(len(windows))
    if calibration is not None:
        free = free[~touched(windows, calibration)]
    if len(free) < 2 * FEWEST:
        raise ValueError(
            f"the text has {len(windows)} windows of {windows.shape[1]} tokens, of which {len(free)} share "
            f"nothing with a calibration window; {2 * FEWEST} are needed to search and to verify: give more "
            "text, fewer --samples or a shorter --length"
        )
    count = min(len(free), SEARCHED + VERIFIED)
    free = free[torch.linspace(0, len(free) - 1, count).round().long()]
    # two of five to search on, the text over; of four, two
    searched = torch.arange(count) * SEARCHED % (SEARCHED + VERIFIED) < SEARCHED
    return [free[searched], free[~searched]]


def touched(windows: Tensor, calibration: Tensor) -> Tensor:
    """(W,) bool, which windows share at least one token's place with a calibration window.

    A calibration window is looked for in the text, not only where it was drawn: a text that is there twice is
    left out twice.

    Args:
        windows: (W, L) int64, one behind the other. calibration: (N, M) int64.
    """
    stream, length = windows.flatten(), windows.shape[1]
    found = torch.zeros(len(windows), dtype=torch.bool)
    for window in calibration:
        for start in _places(stream, window):
            last = min(start + len(window), len(stream)) - 1
            found[start // length : last // length + 1] = True
    return found


def _places(text: Tensor, part: Tensor) -> list[int]:
    """Where a part begins in a text, also where the text ends before it does."""
    starts = torch.nonzero(text == part[0]).flatten()
    for offset in range(1, min(_HEAD, len(part))):
        behind = starts + offset
        starts = starts[(behind >= len(text)) | (text[behind.clamp(max=len(text) - 1)] == part[offset])]
    return [
        start
        for start in starts.tolist()
        if torch.equal(text[start : start + len(part)], part[: len(text) - start])
    ]
