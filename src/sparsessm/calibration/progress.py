"""How far a stage is: what every loop counts its steps with."""

from __future__ import annotations

from collections.abc import Callable

# Called as (stage, steps done, steps in all, the block where the work is now; empty where there is none).
Progress = Callable[[str, int, int, str], None]


class Steps:
    """The steps of one stage, told to whoever wants to know as they are done.

    Args:
        stage: its name. total: steps in all; what is done beyond them is not told.
        progress: who is told; None: nobody.
        blocks: of the model; 0: where the work is is not told.
    """

    def __init__(self, stage: str, total: int, progress: Progress | None, blocks: int = 0) -> None:
        self._stage, self._total, self._progress, self._done = stage, total, progress, 0
        self._blocks, self._place = blocks, ""

    def __call__(self, steps: int = 1) -> None:
        """So many steps more are done."""
        if self._done < self._total:
            self._done = min(self._done + steps, self._total)
            self._tell()

    def at(self, block: int) -> None:
        """The work is at the block of this index now; what follows the last one is the head."""
        if self._blocks:
            self._place = f"block {block + 1} of {self._blocks}" if block < self._blocks else "head"
            self._tell()

    def _tell(self) -> None:
        if self._progress:
            self._progress(self._stage, self._done, self._total, self._place)
