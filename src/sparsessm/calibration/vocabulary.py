"""What an error in a row of the head costs, and of one that is the embedding too; for prices.py.

A row is a token of the vocabulary. Of most tokens a few thousand positions of text say nothing, and they must
not look as if they cost nothing: what the model expects counts beside what the text says.

As a head, the row of token v costs F_v dw' H dw with F_v = E[p_v (1 - p_v)] (the expected Fisher information
of the logits, no labels in it) and H = E[x x'] of the head's inputs. As an embedding it costs n_v dw' G dw,
with n_v the share of tokens that are v, and G = E[g g'] of the loss's gradient g behind the embedding. A
matrix that is both costs their sum, in whose place we take a price for each row times one Hessian for all
(docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm.methods.observers import Adding

# Of the mean price, what every row has at least: an error of the logits acts by its exponential, so a row
# that is far off costs more than its curvature says.
RARE = 1 / 32


class Power(Adding):
    """Squares of a layer's inputs, summed."""

    def add(self, x: Tensor) -> None:
        self._plus(squares=x.detach().square().sum(dtype=torch.float64))

    def result(self) -> Tensor:
        return self._sums.get("squares", torch.zeros((), dtype=torch.float64))


@dataclass
class Sums:
    """Over the positions of a group of windows, float64 all.

    Attributes:
        fisher: (vocabulary,) p (1 - p). expected: (vocabulary,) p. power: () squares of the head's inputs.
        said: (vocabulary,) how often each token is there. gram: (d_model, d_model) g g'.
    """

    fisher: Tensor
    expected: Tensor
    power: Tensor
    said: Tensor
    gram: Tensor

    @classmethod
    def nothing(cls, vocabulary: int, width: int, device: torch.device) -> Sums:
        """Where summing begins."""
        row, square = torch.zeros(vocabulary), torch.zeros(width, width)
        return cls(*(part.to(device, torch.float64) for part in (row, row, torch.zeros(()), row, square)))

    def add_logits(self, logits: Tensor, scale: float) -> None:
        """logits: (rows, vocabulary). scale: of the head's outputs, in them."""
        likely = logits.detach().float().softmax(-1)
        self.expected = self.expected + likely.sum(0, dtype=torch.float64)
        spread = (likely * (1 - likely)).sum(0, dtype=torch.float64)
        self.fisher = self.fisher + scale**2 * spread

    def add_lookups(self, tokens: Tensor, grad: Tensor) -> None:
        """tokens: (W, L). grad: (W, L, d_model), of the loss, behind the embedding."""
        self.said = self.said + torch.bincount(tokens.flatten(), minlength=len(self.said))
        rows = grad.detach().flatten(0, 1).double()
        self.gram = self.gram + rows.mT @ rows


def of_head(means: Mapping[str, Tensor]) -> Tensor:
    """(vocabulary,) float64, the price of each row; `means`: of `Sums`, over the positions."""
    return means["fisher"] + RARE * means["fisher"].mean()


def of_embedding(means: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of an embedding that is no head: the price of each row, and the Hessian that takes the place of inputs.

    Args, Returns: as `of_both`.
    """
    rows = _often(means)
    return rows + RARE * rows.mean(), means["gram"]


def of_both(means: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of a head that is the embedding too: the price of each row, and what the Hessian of its inputs gets
    added.

    Args:
        means: of `Sums`, over the positions.

    Returns:
        (vocabulary,) and (d_model, d_model), float64.
    """
    fisher, power, gram = means["fisher"], means["power"], means["gram"]
    often = _often(means)
    also = gram * (often.sum() / fisher.sum())
    rows = (fisher * power + often * gram.trace()) / (power + also.trace())
    return rows + RARE * rows.mean(), also


def _often(means: Mapping[str, Tensor]) -> Tensor:
    """(vocabulary,): how often each token is looked up, half counted and half expected."""
    return (means["said"] + means["expected"]) / 2
