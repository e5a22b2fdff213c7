"""Perplexity before and after: several models on the same windows of the recipe's data.

Place in the flow: around a run, for `prune` and `demo`. The windows are held out, unless the data is a
local file; `Report.caveat` says so then.

What is printed is the change, with an interval that is paired over windows and needs 16 of them. So that
measuring does not take as long as pruning, `prune` measures on so many, and a window has at most `LONGEST`
tokens, however long those of the calibration are; `sparsessm eval` measures on more and longer ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.progress import Progress
from sparsessm.checkpoint import Checkpoint
from sparsessm.data.texts import evaluation_windows
from sparsessm.evaluation.perplexity import Perplexity, difference, measure
from sparsessm.recipe.recipe import Recipe, window_length

WINDOWS = 16  # as few as an interval needs
LONGEST = 1024  # tokens in a window


@dataclass(frozen=True)
class Yardstick:
    """What models are measured on.

    Attributes:
        data: name of the text. windows: (W, L). n_bytes: that the predicted tokens stand for.
    """

    data: str
    windows: Tensor
    n_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe, windows: int) -> Yardstick:
        """So many windows of the recipe's data, always the same ones, spread over the text.

        A window has as many tokens as one of the calibration, but no more than `LONGEST`. A shorter text
        gives fewer windows.

        Raises:
            ValueError: a text shorter than one window.
        """
        length = min(recipe.length or window_length(checkpoint.trained_length), LONGEST)
        return cls.on(checkpoint, recipe.data, length=length, limit=windows, column=recipe.column)

    @classmethod
    def on(
        cls,
        checkpoint: Checkpoint,
        data: str,
        *,
        length: int | None = None,
        limit: int | None = None,
        column: str | None = None,
    ) -> Yardstick:
        """Any text; its options are those of `sparsessm.evaluate`."""
        length = length or window_length(checkpoint.trained_length)
        found = evaluation_windows(data, checkpoint.tokenizer, length=length, limit=limit, column=column)
        return cls(data, *found)

    def measure(self, architecture: Architecture, progress: Progress | None = None) -> Perplexity:
        """Perplexity of a model as it is now, dense or pruned."""
        return measure(architecture, self.windows, self.n_bytes, data=self.data, progress=progress)


def compared(dense: Perplexity, pruned: Perplexity) -> dict[str, Any]:
    """What a report says about perplexity: both measurements and their paired difference."""
    return {
        "dense": dense.record(),
        "pruned": pruned.record(),
        "difference": asdict(difference(dense, pruned)),
    }
