"""Which axes give how much, where the recipe only says how many parameters are to go.

Each axis is tried alone at two sizes on a copy of the model, and what that costs is measured in nats a token
on calibration windows that the trial did not look at. Between and beyond the two a cost grows as a power of
the parameters saved. Of all sizes that together save what is asked for, the cheapest sum wins: measured loss
for each saved parameter, axis against axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sparsessm.architectures import Architecture, Axis, Block, adapt
from sparsessm.calibration.journal import Forgetful, Journal
from sparsessm.calibration.loss import losses
from sparsessm.calibration.prices import row_prices
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import first_tokens
from sparsessm.pruning.blocks import chosen_blocks
from sparsessm.pruning.units import shrink
from sparsessm.recipe.sizes import INNER, Order, possible, size_of

TRIED = (0.25, 0.5)  # shares of an axis that are tried, as near as transformers can express
TRIAL_TOKENS = 16_384  # that a trial is calibrated on
HELD_TOKENS = 8_192  # and measured on, at most
SLACK = 0.01  # of all parameters: by how much less or more may go than was asked for
# Of what was asked for: how much more may go. Units come in steps, and the larger step may be the cheaper.
MORE = 0.5


@dataclass(frozen=True)
class Trial:
    """One axis shrunk alone.

    Attributes:
        size: units that stayed. saved: parameters that went. loss: nats a token above the dense model.
    """

    axis: str
    size: int
    saved: int
    loss: float


def find(
    architecture: Architecture,
    order: Order,
    tokens: Tensor,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> tuple[Order, list[dict[str, Any]]]:
    """The sizes with which `order.share` of all parameters go at the least predicted loss.

    Args:
        architecture: of the dense model, which is not changed. tokens: (W, L) int64.
        journal: keeps each trial.

    Returns:
        The order with its sizes, and the trials as plain values.

    Raises:
        ValueError: too few windows, or a share that no combination of sizes reaches; says what is possible.
    """
    assert order.share is not None
    if len(tokens) < 2:  # one to calibrate on, one to measure on
        raise ValueError(f"pattern 'structured' needs at least 2 calibration windows, got {len(tokens)}")
    journal = journal or Forgetful(architecture)
    aside = max(1, min(HELD_TOKENS // tokens.shape[1], len(tokens) // 4))
    held, few = tokens[-aside:], first_tokens(tokens[:-aside], TRIAL_TOKENS, least=2)
    dense = journal.once("mix dense", lambda: float(losses(architecture, held).mean()))
    axes = list(order.methods)
    jobs = [(axis, size) for axis in axes for size in _tried(architecture, axis)]
    prices = journal.once("mix prices", lambda: row_prices(architecture, few)) if order.priced else {}
    leaving: list[int] = []  # blocks in the order in which they go: asked once for all sizes
    if fewest := min((size for axis, size in jobs if axis == "block"), default=0):
        alone = replace(order, sizes={"block": fewest})
        leaving = journal.once("mix blocks", lambda: chosen_blocks(architecture, alone, few, None))
    trials = []
    steps = Steps("mix", len(jobs), progress)
    for axis, size in jobs:
        alone = replace(order, sizes={axis: size}, share=None)
        lossy = partial(_loss_of, architecture, alone, few, held, prices, leaving)
        loss = journal.once(f"mix {axis} {size}", lossy) - dense
        trials.append(Trial(axis, size, saved(architecture, {axis: size}), loss))
        steps()
    sizes = cheapest(architecture, trials, order.share)
    return replace(order, sizes=sizes, share=None), [asdict(trial) for trial in trials]


def _loss_of(
    architecture: Architecture,
    order: Order,
    tokens: Tensor,
    held: Tensor,
    prices: Mapping[str, Tensor],
    leaving: Sequence[int],
) -> float:
    """Nats a token on held-out windows of a copy of the model that is shrunk."""
    copied = adapt(*architecture.copied())
    shrink(copied, order, tokens, prices=prices, leaving=leaving)
    return float(losses(copied, held).mean())


def _tried(architecture: Architecture, axis: str) -> list[int]:
    now, sizes = size_of(architecture, axis), possible(architecture, axis)
    wanted = [min(sizes, key=lambda size: abs(size - (1 - share) * now), default=0) for share in TRIED]
    return [size for size in dict.fromkeys(wanted) if size]


def cheapest(architecture: Architecture, trials: list[Trial], share: float) -> dict[str, int]:
    """The sizes whose predicted losses add up to the least, among those that save `share` or somewhat more.

    Raises:
        ValueError: none does.
    """
    total = sum(parameter.numel() for parameter in architecture.model.parameters())
    curves = {axis: [t for t in trials if t.axis == axis] for axis in dict.fromkeys(t.axis for t in trials)}
    options = {
        axis: [size_of(architecture, axis), *reversed(possible(architecture, axis))] for axis in curves
    }
    kinds = _kinds(architecture.blocks)
    expected = {
        axis: {size: predicted(curves[axis], _saved(kinds, {axis: size})) for size in sizes}
        for axis, sizes in options.items()
    }
    best, found, nearest = math.inf, {}, math.inf
    for sizes in itertools.product(*options.values()):
        chosen = dict(zip(options, sizes, strict=True))
        gone, loss = _saved(kinds, chosen) / total, sum(expected[axis][size] for axis, size in chosen.items())
        near = share - SLACK <= gone <= share * (1 + MORE) + SLACK
        nearer = abs(gone - share) < abs(nearest - share)
        if not (loss < best if near else nearer) or not gone or not _sayable(architecture, chosen):
            continue
        nearest = gone if nearer else nearest
        if near:
            best, found = loss, {axis: size for axis, size in chosen.items() if size < options[axis][0]}
    if not found:
        raise ValueError(
            f"pattern 'structured': transformers cannot express sizes that save {share:.3g} of the "
            f"parameters; the nearest possible share is {nearest:.3g}"
        )
    return found


def _sayable(architecture: Architecture, sizes: Mapping[str, int]) -> bool:
    """Whether transformers can express these sizes together."""
    try:
        for last in range(1, len(INNER) + 1):
            architecture.fields({axis: sizes[axis] for axis in INNER[:last] if axis in sizes})
    except ValueError:
        return False
    return True


def predicted(curve: list[Trial], gone: int) -> float:
    """Nats that saving so many parameters along an axis costs: a power law through what was measured.

    The power is at least 1 (twice as much never costs less than twice) and at most 4.
    """
    if not gone:
        return 0.0
    points = sorted((t.saved, max(t.loss, 1e-6)) for t in curve if t.saved > 0 and math.isfinite(t.loss))
    if not points:  # nothing was saved, or the model was ruined
        return math.inf
    (x0, y0), (x1, y1) = points[0], points[-1]
    power = min(4.0, max(1.0, math.log(y1 / y0) / math.log(x1 / x0))) if x1 > x0 else 1.0
    x, y = min(points, key=lambda point: abs(math.log(point[0] / gone)))
    return y * (gone / x) ** power


def saved(architecture: Architecture, sizes: Mapping[str, int]) -> int:
    """Parameters that go when every layer has these sizes, on the average layer where blocks go."""
    return _saved(_kinds(architecture.blocks), sizes)


def _kinds(blocks: Sequence[Block]) -> list[tuple[Block, int]]:
    """One block of each shape, and how many are like it: a large model has some 100,000 mixes to look at."""
    found: dict[Any, list[Block]] = {}
    for block in blocks:
        shapes = tuple((name, parameter.shape) for name, parameter in block.layer.named_parameters())
        found.setdefault((block.axes, shapes), []).append(block)
    return [(alike[0], len(alike)) for alike in found.values()]


def _saved(kinds: Sequence[tuple[Block, int]], sizes: Mapping[str, int]) -> int:
    total = sum(count for _, count in kinds)
    left = sizes.get("block", total) / total
    gone = 0.0
    for block, count in kinds:
        whole = sum(parameter.numel() for parameter in block.layer.parameters())
        gone += count * (whole - left * (whole - _saved_inside(block, sizes)))
    return round(gone)


def _saved_inside(block: Block, sizes: Mapping[str, int]) -> int:
    """Parameters of a block that go when its axes have these sizes."""
    axes = [axis for axis in block.axes if axis.name in sizes]
    shapes = {name: list(parameter.shape) for name, parameter in block.layer.named_parameters()}
    before = {name: math.prod(shape) for name, shape in shapes.items()}
    lost: dict[tuple[str, int], dict[str, float]] = {}
    for axis in axes:
        for part in axis.parts:
            by = lost.setdefault((part.tensor, part.dim), {})
            by[axis.name] = by.get(axis.name, 0) + (axis.size - sizes[axis.name]) * part.width
    for (name, dim), by in lost.items():
        shapes[name][dim] -= _together(axes, shapes[name][dim], by, name, dim, sizes)
    return sum(before[name] - math.prod(shape) for name, shape in shapes.items())


def _together(
    axes: list[Axis], length: int, by: Mapping[str, float], name: str, dim: int, sizes: Mapping[str, int]
) -> int:
    """Rows that several axes take together: heads take their channels with them."""
    if not {"head", "channel"} <= by.keys():
        return round(sum(by.values()))
    channels = next(axis for axis in axes if axis.name == "channel")
    left = sizes["channel"] / channels.size
    heads = next(axis for axis in axes if axis.name == "head")
    shared = [p for p in heads.parts if (p.tensor, p.dim) == (name, dim) and p.width == channels.size]
    groups = sum(axis.name == "head" for axis in axes)
    both = len(shared) * groups * channels.size * sizes["head"] * (1 - left)
    whole = by["head"]
    return round(whole + both + by.get("state", 0))
