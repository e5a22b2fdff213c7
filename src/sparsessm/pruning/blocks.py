"""Which blocks leave a model: one after the other, the one without which it loses least.

Place in the flow: `units.py` asks before it walks through the blocks that stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import Architecture
from sparsessm.calibration.loss import head_losses, losses
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import first_tokens, grouped
from sparsessm.calibration.walk import embedded, walk
from sparsessm.methods.base import seed_of
from sparsessm.recipe.sizes import Order

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
    total, selection = len(architecture.blocks), order.methods["block"]
    count = total - order.sizes["block"]
    if not selection.looks:
        random = torch.Generator().manual_seed(seed_of(order.seed, "blocks"))
        gone: list[int] = []
        for _ in range(count):
            open_ = _may_go(architecture, gone)
            gone.append(open_[int(torch.randint(len(open_), (1,), generator=random))])
        return gone
    assert tokens is not None
    choose = _by_change if selection.looks["block"] == "change" else _by_loss
    return choose(architecture, first_tokens(tokens, BLOCK_TOKENS), count, Steps("blocks", count, progress))


def _by_loss(architecture: Architecture, tokens: Tensor, count: int, steps: Steps) -> list[int]:
    """Greedily, the block without which the loss is lowest.

    What a block costs is taken to grow as others go. So a block whose last known cost is above the best new
    one is not asked again (lazy greedy, Minoux 1978): after the first turn a few passes choose each.
    """
    before, alone = _each_alone(architecture, tokens)
    costs = {index: loss - before for index, loss in alone.items()}
    gone: list[int] = []
    for turn in range(count):
        open_ = _may_go(architecture, gone)
        asked = set(open_) if turn == 0 else set()
        while True:
            # A loss that is not finite is of a block that must stay.
            best = min(open_, key=lambda index: costs[index] if math.isfinite(costs[index]) else math.inf)
            if best in asked:
                break
            costs[best] = _loss_without(architecture, tokens, [*gone, best]) - before
            asked.add(best)
        if not math.isfinite(costs[best]):
            raise ValueError("the cost of removing a block is not finite for any block")
        gone.append(best)
        before += costs[best]
        steps()
    return gone


def _by_change(architecture: Architecture, tokens: Tensor, count: int, steps: Steps) -> list[int]:
    """The blocks that turn their input least in the dense model (Men et al., arXiv 2403.03853)."""
    costs = _change(architecture, tokens)
    gone: list[int] = []
    for _ in range(count):
        open_ = [index for index in _may_go(architecture, gone) if math.isfinite(costs[index])]
        if not open_:
            raise ValueError("the cost of removing a block is not finite for any block")
        gone.append(min(open_, key=lambda index: costs[index]))
        steps()
    return gone


def _may_go(architecture: Architecture, gone: Sequence[int]) -> list[int]:
    if open_ := architecture.may_go(gone):
        return open_
    raise ValueError(f"at most {len(gone)} blocks can be removed: stock code needs the others")


def _loss_without(architecture: Architecture, tokens: Tensor, gone: Sequence[int]) -> float:
    """Nats a token without these blocks."""
    return float(losses(architecture, *grouped(tokens, GROUP), without=gone).mean())


def _each_alone(architecture: Architecture, tokens: Tensor) -> tuple[float, dict[int, float]]:
    """Nats a token of the model, and by index without each of the blocks, the others being there.

    Memory: hidden states of `GROUP` tokens for each block that is left out in the same walk: all of them
    where blocks are in memory; else as many as there is room for, and every block is opened once for those.
    """
    found = []
    blocks = range(len(architecture.blocks))
    for group in grouped(tokens, GROUP):
        losses: list[Tensor] = []
        for out in _in_walks(architecture, blocks, group):
            for stop in walk(architecture, None, group, tail=True):
                if stop.block is architecture.tail:
                    every = stop.groups if not losses else stop.groups[1:]  # the first is the whole model
                    losses += [head_losses(architecture, one, group) for one in every]
                else:
                    entering = stop.groups[0]
                    stop.advance()
                    if stop.block.index in out:
                        stop.groups.append(entering)  # goes on as if this block were not there
        found.append(torch.stack(losses))
    whole, *alone = torch.cat(found, 1).mean(1).tolist()
    return whole, {block.index: loss for block, loss in zip(architecture.blocks, alone, strict=True)}


def _in_walks(architecture: Architecture, blocks: Sequence[int], group: Tensor) -> Iterator[Sequence[int]]:
    """The blocks, as many at a time as hidden states of the group have room for."""
    one = embedded(architecture, group[:1, :1])
    count = architecture.residence.at_once(one.nbytes * group.numel(), len(blocks), free=len(blocks))
    for first in range(0, len(blocks), count):
        yield blocks[first : first + count]


def _change(architecture: Architecture, tokens: Tensor) -> dict[int, float]:
    """1 - cosine between input and output of each block, mean over the tokens."""
    costs = {}
    for stop in walk(architecture, None, *grouped(tokens, GROUP)):
        entering = list(stop.groups)
        stop.advance()
        alike = [cosine(*pair).flatten() for pair in zip(entering, stop.groups, strict=True)]
        costs[stop.block.index] = 1 - float(torch.cat(alike).mean())
    return costs


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """(..., d) twice -> (...) float64; whatever the unit, also of subnormal vectors. A zero vector is like
    another one, and unlike all others."""
    one, other = (F.normalize(_unit(part), dim=-1, eps=0.1) for part in (first, second))
    silent = ((first == 0).all(-1), (second == 0).all(-1))
    return (one * other).sum(-1).masked_fill(silent[0] & silent[1], 1.0)


def _unit(vectors: Tensor) -> Tensor:
    """With a largest magnitude of 1, zero vectors apart."""
    vectors = vectors.double()
    most = vectors.abs().amax(-1, keepdim=True)
    return vectors / most.where(most > 0, 1.0)
