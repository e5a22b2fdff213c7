"""The loss of a model on windows, nats of the next token, for perplexity, prices and the choice of blocks.

Logits are made for some positions at a time, so that their memory does not grow with the windows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import Architecture
from sparsessm.calibration.progress import Steps
from sparsessm.calibration.walk import walk

ROWS = 256  # rows of logits alive at a time: 50 MB for a vocabulary of 50,000


def in_rows(*states: Tensor, rows: int) -> Iterator[tuple[Tensor, ...]]:
    """The positions of windows so many at a time, in their order.

    Args:
        states: (W, T, ...) each, of the same windows.

    Yields:
        (at most `rows`, ...) of each.
    """
    return zip(*(part.flatten(0, 1).split(rows) for part in states), strict=True)


def predictions(hidden: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What predicts and what is to be predicted, some positions at a time: (rows, d_model) and (rows,).

    Args:
        hidden: (W, L, d_model) behind the last block. tokens: (W, L) int64; the first of a window is not
            predicted, the last predicts nothing.
    """
    return in_rows(hidden[:, :-1], tokens[:, 1:], rows=ROWS)


def nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of tokens (rows,) by logits (rows, vocabulary), in float32 at least."""
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(precise, tokens, reduction="none")


@torch.inference_mode()
def head_losses(architecture: Architecture, hidden: Tensor, tokens: Tensor) -> Tensor:
    """(W,) float64, mean nats a predicted token of each window, of states behind the last block.

    Args:
        hidden: (W, L, d_model). tokens: (W, L) int64, L at least 2.
    """
    device = architecture.tail.device
    with architecture.tail.computing(architecture.compute.used):
        parts = [
            nats(architecture.head(rows.to(device)[None])[0], right.to(device)).double()
            for rows, right in predictions(hidden, tokens)
        ]
    return torch.cat(parts).view(len(tokens), -1).mean(1)


def losses(
    architecture: Architecture, *groups: Tensor, without: Collection[int] = (), steps: Steps | None = None
) -> Tensor:
    """(W,) float64, mean nats a predicted token of each window of all groups, by the model as it is.

    Args:
        groups: (W, L) int64 each, L at least 2; those of a group go through a block at once.
        without: indices of blocks that are left out. steps: is told where the walk stands.
    """
    found: list[Tensor] = []
    for stop in walk(architecture, None, *groups, without=without, tail=True, steps=steps):
        if stop.block is architecture.tail:
            found = [head_losses(architecture, *pair) for pair in zip(stop.groups, groups, strict=True)]
    return torch.cat(found)
