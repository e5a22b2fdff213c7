"""How many channels each layer keeps, where layers may differ: for packed files and our runtime.

Stock configurations have one number for all layers, and layers need very different ones. What each step of
the elimination costs is asked of every layer of the dense model; the steps that cost least are taken,
whichever layer they are in. Then `units.py` walks through the layers as usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.journal import Forgetful, Journal
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.walk import walk
from sparsessm.methods.structured import elimination
from sparsessm.pruning.units import look
from sparsessm.recipe.sizes import Order, size_of, width_step

LEAST = 8  # a layer keeps one in so many channels at least


def find(
    architecture: Architecture,
    order: Order,
    tokens: Tensor,
    prices: Mapping[str, Tensor],
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> dict[int, int]:
    """Layer -> channels that stay, `order.sizes` on average.

    Args:
        architecture: of the dense model, which is not changed. tokens: (W, L) int64.
        prices: of output rows (`row_prices`), in the unit that layers share.
        journal: keeps what each layer says.
    """
    now = size_of(architecture, "channel")
    step, gone_each = width_step(now), now - order.sizes["channel"]
    # channels that one layer may lose
    most = max((now - max(step, now // LEAST)) // step * step, gone_each)
    alone = replace(order, sizes={"channel": now - most})
    stage = (journal or Forgetful(architecture)).stage("widths")
    curves = [curve for note in stage.left.values() for curve in note]
    noted = len(curves)

    def note() -> list[list[float]]:
        nonlocal noted
        new, noted = curves[noted:], len(curves)
        return new

    done = Steps("widths", len(architecture.blocks), progress)
    for stop in walk(architecture, tokens, stage=stage, note=note):
        axes = [axis for axis in stop.block.axes if axis.name == "channel"]
        _, errors = elimination(look(stop, "channel", axes, most, alone, prices))
        curves.append(errors.view(-1, step).sum(1).tolist())
        done()
    gone = architecture.ranks.given(allot(curves, len(curves) * gone_each // step))
    return {block.index: now - step * count for block, count in zip(architecture.blocks, gone, strict=True)}


def allot(curves: Sequence[Sequence[float]], total: int) -> list[int]:
    """Steps that each layer takes, so that `total` steps cost the least, each layer's own in their order.

    Args:
        curves: what the steps of each layer cost, one after the other; never less than the one before counts.
    """
    table = [torch.tensor(curve, dtype=torch.float64).cummax(0).values for curve in curves]
    owner = torch.cat([torch.full((len(row),), index) for index, row in enumerate(table)])
    cheapest = torch.cat(table).argsort(stable=True)[:total]
    return torch.bincount(owner[cheapest], minlength=len(table)).tolist()
