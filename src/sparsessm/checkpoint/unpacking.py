"""The way back from a packed directory to the stock checkpoint that it was made from.

Beside `packed.py`, which writes and reads such directories.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from . import writing
from .at_rest import AtRest, at_rest
from .opened import open_checkpoint
from .packed import refuse_stock
from .writing import refuse_existing, stock_weights, write


def unpack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> str:
    """Write a packed directory as the stock checkpoint it was made from, in that one's format.

    Every tensor has the bits it had, unless it was packed in another dtype or is on a grid.

    Returns:
        What was rounded to the stock dtype, in words; empty if nothing was.

    Raises:
        ValueError: as `read` and `refuse_existing`; no stock configuration says its shapes.
        OSError: writing failed; nothing is left behind, an old target is intact.
    """
    opened = open_checkpoint(source)
    refuse_stock(opened)
    refuse_existing(out, force, opened.source)
    found = at_rest(opened, tokenizer)
    rounding = _Rounding(found)
    weights, nbytes = stock_weights(found.checkpoint, rounding.stored), writing.stored_bytes(found.checkpoint)
    write(found.checkpoint, out, weights, nbytes, opened.ours, force)
    return rounding.told()


class _Rounding:
    """The tensors of a packed directory in their stock dtype, and what that changes."""

    def __init__(self, found: AtRest) -> None:
        self._found, self._errors = found, dict[str, float]()
        self._dtypes: dict[torch.dtype, None] = {}

    def stored(self, name: str) -> Tensor:
        """As `AtRest.stored`."""
        tensor = self._found.tensors[name]
        if not tensor.scaled:
            return tensor.decode() if tensor.itself is None else tensor.itself
        values, rounded = tensor.decode(torch.float32), tensor.decode()
        power = float(values.square().sum(dtype=torch.float64))
        error = float((values - rounded.float()).square().sum(dtype=torch.float64))
        if error:
            self._errors[name] = math.sqrt(error / power)
            self._dtypes[tensor.dtype] = None
        return rounded

    def told(self) -> str:
        """In words."""
        if not self._errors:
            return ""
        dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in self._dtypes)
        return (
            f"{len(self._errors)} matrices were rounded to {dtypes}, which changes their values by "
            f"{max(self._errors.values()):.2%} at most (root mean square)"
        )
