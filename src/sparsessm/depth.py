"""Which blocks leave a model: one after the other, the one without which it loses least.

Place in the flow: `structure.py` asks before it walks through the blocks that stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import Architecture, Block
from sparsessm.calibrate import Progress
from sparsessm.evaluation import ROWS as HEAD_ROWS
from sparsessm.methods.base import seed_of
from sparsessm.units import Order

BLOCK_TOKENS = 16_384  # of the calibration windows on which blocks are compared
GROUP = 4_096  # of them that go through a block together


def chosen_blocks(
    architecture: Architecture, order: Order, tokens: Tensor | None, progress: Progress | None
) -> list[int]:
    """The blocks that go, in the order in which they do; empty if the order names none.

    Raises:
        ValueError: more blocks than stock code can do without, or costs that are not finite.
    """
    if "block" not in order.sizes:
        return []
    total, selection = len(architecture.blocks), order.selections["block"]
    count = total - order.sizes["block"]
    if not selection.looks:
        random = torch.Generator().manual_seed(seed_of(order.seed, "blocks"))
        gone: list[int] = []
        for _ in range(count):
            open_ = _may_go(architecture, gone)
            gone.append(open_[int(torch.randint(len(open_), (1,), generator=random))])
        return gone
    assert tokens is not None
    few = tokens[: max(1, BLOCK_TOKENS // tokens.shape[1])]
    cost = _change if selection.looks["block"] == "change" else _loss_without
    gone = []
    for turn in range(count):
        open_ = _may_go(architecture, gone)
        costs = {index: value for index, value in cost(architecture, few, gone).items() if index in open_}
        costs = {index: cost for index, cost in costs.items() if math.isfinite(cost)}  # others must stay
        if not costs:
            raise ValueError("the cost of removing a block is not finite, of whichever")
        gone.append(min(costs, key=lambda index: costs[index]))
        if progress:
            progress("blocks", turn + 1, count)
    return gone


def _may_go(architecture: Architecture, gone: Sequence[int]) -> list[int]:
    if open_ := architecture.may_go(gone):
        return open_
    raise ValueError(f"no more than {len(gone)} blocks can go: stock code needs those that are left")


def _loss_without(architecture: Architecture, tokens: Tensor, gone: Sequence[int]) -> dict[int, float]:
    """Nats a token without each of the blocks that are left."""
    left = [block for block in architecture.blocks if block.index not in gone]
    costs = dict.fromkeys((block.index for block in left), 0.0)
    for group in tokens.split(max(1, GROUP // tokens.shape[1])):
        hidden = embedded(architecture, group)
        for place, block in enumerate(left):
            rest = hidden
            for later in left[place + 1 :]:
                rest = _through(later, rest)
            costs[block.index] += loss_of(architecture, rest, group) * len(group) / len(tokens)
            hidden = _through(block, hidden)
    return costs


def _change(architecture: Architecture, tokens: Tensor, gone: Sequence[int]) -> dict[int, float]:
    """1 - cosine between input and output of each of the blocks that are left, mean over the tokens."""
    left = [block for block in architecture.blocks if block.index not in gone]
    costs = dict.fromkeys((block.index for block in left), 0.0)
    for group in tokens.split(max(1, GROUP // tokens.shape[1])):
        hidden = embedded(architecture, group)
        for block in left:
            out = _through(block, hidden)
            alike = float(F.cosine_similarity(hidden, out, dim=-1).double().mean())
            costs[block.index] += (1 - alike) * len(group) / len(tokens)
            hidden = out
    return costs


def _through(block: Block, hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        out, _ = block.forward(hidden)
    assert out is not None
    return out


def loss_of(architecture: Architecture, hidden: Tensor, tokens: Tensor) -> float:
    """Mean nats of the next token, of what the last block put out (W, L, d_model)."""
    rows, labels = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    total = 0.0
    with torch.inference_mode():
        for part, right in zip(rows.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True):
            logits = architecture.head(part[None])[0].float()
            total += float(F.cross_entropy(logits, right, reduction="sum").double())
    return total / len(labels)


def embedded(architecture: Architecture, tokens: Tensor) -> Tensor:
    """(W, L) token ids -> (W, L, d_model), a new tensor."""
    with torch.inference_mode():
        return architecture.embed(tokens)
