"""How far a stage is: what every loop counts its steps with."""

from __future__ import annotations

from collections.abc import Callable

# Called as (stage, steps done, steps in all).
Progress = Callable[[str, int, int], None]


class Steps:
    """The steps of one stage, told to a progress bar as they are done.

    Args:
        stage: its name. total: steps in all; what is done beyond them is not told.
        progress: who is told; None: nobody.
    """

    def __init__(self, stage: str, total: int, progress: Progress | None) -> None:
        self._stage, self._total, self._progress, self._done = stage, total, progress, 0

    def __call__(self, steps: int = 1) -> None:
        """So many steps more are done."""
        if self._progress and self._done < self._total:
            self._done = min(self._done + steps, self._total)
            self._progress(self._stage, self._done, self._total)
