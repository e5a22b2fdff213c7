"""Method `balanced`: the states of a Mamba-2 are projected to the directions that matter, for our runtime.

Beside `units.py`, which keeps whole states of a stock model. One pass through the dense model sums what
each layer's states and readouts do; of the directions of all layers those stay that carry the most, so that
layers keep different numbers of them. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.journal import Forgetful, Journal, Stage
from sparsessm.calibration.prices import row_prices
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import slab_width
from sparsessm.calibration.walk import walk
from sparsessm.methods.balanced import balanced_truncation, energies
from sparsessm.methods.observers import StateMoments, StateSums
from sparsessm.pruning.naming import naming
from sparsessm.pruning.units import EVERY, price_of
from sparsessm.recipe.sizes import Order
from sparsessm.report.row import Row

LOOKS = 16  # for each state, at least


def project(
    architecture: Architecture,
    order: Order,
    tokens: Tensor,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[Row]:
    """Project the states of every layer in place.

    Args:
        architecture: from `adapt(model)`, one that `projects`.
        order: `sizes` says how many directions a layer keeps on average.
        tokens: (W, L) int64 calibration windows.
        journal: keeps what each layer's states do.

    Returns:
        A row for each layer.

    Raises:
        ValueError: activations that are not finite, with the block's name.
    """
    journal = journal or Forgetful(architecture)
    prices = row_prices(architecture, tokens, progress, journal) if order.priced else {}
    sums = _look(architecture, tokens, prices, progress, journal.stage("states"))
    counts = architecture.ranks.given(allot([energies(layer) for layer in sums], order.sizes["state"]))
    rows = []
    for stop, layer, count in zip(walk(architecture, None), sums, counts, strict=True):
        block, (groups, states, _) = stop.block, layer.states.shape
        if count < states:
            projections = architecture.ranks.given(balanced_truncation(layer, count))
            there = (part.to(block.device) for part in projections)
            stop.replace(architecture.project(block, *there))
        rows.append(
            Row(
                target=f"{block.name}.state",
                layer=block.index,
                family="state",
                method=order.methods["state"].name,
                pattern="structured:state",
                removed="projected",
                total=groups * states,
                pruned=groups * (states - count),
                price="fisher" if prices else "none",
            )
        )
    architecture.ranks.wait()  # the last block is written
    return rows


def _look(
    architecture: Architecture,
    tokens: Tensor,
    prices: Mapping[str, Tensor],
    progress: Progress | None,
    stage: Stage,
) -> list[StateSums]:
    """What the states of every layer do in the dense model."""
    # as many looks as the sums need to have full rank, where there are few tokens
    enough = max(1, tokens.numel() // (LOOKS * architecture.states))
    every = min(EVERY, enough, slab_width(tokens.shape[1]))
    sums = [StateSums(**note) for note in stage.left.values()]
    steps = Steps("survey", len(architecture.blocks), progress)
    for stop in walk(architecture, tokens, stage=stage, note=lambda: vars(sums[-1])):
        moments = StateMoments(every, price_of(prices, stop.block.target("out_proj")))
        stop.run({"states": moments})
        with naming(stop.block.name):
            seen = stop.result(moments)  # on the CPU, as a journal gives it back
            moved = {name: part.cpu() for name, part in vars(seen).items() if part is not None}
            sums.append(replace(seen, **moved))
        steps()
    return sums


def allot(energies: list[Tensor], mean: int) -> list[int]:
    """How many directions each layer keeps: one at least, `mean` on average, those of the most energy.

    Args:
        energies: of each layer's directions (N,), descending, in units that layers share.
    """
    table = torch.stack(energies)  # a copy
    table[:, 0] = torch.inf
    kept = table.new_zeros(table.numel(), dtype=torch.bool)
    # stable: of equal energies (zeros, where directions are fewer) the first layers' stay
    kept[table.flatten().argsort(descending=True, stable=True)[: len(table) * mean]] = True
    return kept.view_as(table).sum(1).tolist()
