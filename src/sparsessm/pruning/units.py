"""The loop for whole units: states, channels, heads and blocks leave the model, which stays a stock model.

Beside `entries.py`, which removes single entries. Blocks are chosen first, on the dense model; then the
walk goes through the layers as usual, each seeing what the shrunken layers before it produce: 1 look,
2 score, 3 keep the same number in every layer, cut every tensor that shares the axis, 4 repair what is left
by least squares so that it restores the dense model's outputs. Where the recipe names no axis, `mixes.py`
finds who gives how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Axis, Block, Part, Target
from sparsessm.architectures.axes import cut
from sparsessm.architectures.own import guard, level
from sparsessm.architectures.target import rounded
from sparsessm.calibration.journal import Forgetful, Journal, Stage, Stream
from sparsessm.calibration.prices import row_prices
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import slab_width
from sparsessm.calibration.walk import Stop, walk
from sparsessm.kernels import MAX_STATES
from sparsessm.methods.base import seed_of
from sparsessm.methods.hessian import factorise
from sparsessm.methods.observers import (
    InputGram,
    Moments,
    PairMoments,
    StateMoments,
    StateReadout,
)
from sparsessm.methods.patterns import Structured
from sparsessm.methods.repair import dense_target, readout, remix
from sparsessm.methods.step_observers import ColumnVote
from sparsessm.methods.structured import Reader, Units
from sparsessm.pruning.blocks import chosen_blocks
from sparsessm.pruning.naming import naming
from sparsessm.pruning.plan import Rows
from sparsessm.recipe.sizes import INNER, REPAIRED, Order, mixable
from sparsessm.report.row import Row

HELD = 1 << 27  # bytes of states, where they are looked at after every step
EVERY = 16  # steps between two looks at the states: neighbours are alike, and pairs of states are dear
PATTERN = Structured()


def shrink(
    architecture: Architecture,
    order: Order,
    tokens: Tensor | None,
    progress: Progress | None = None,
    prices: Mapping[str, Tensor] | None = None,
    leaving: Sequence[int] = (),
    widths: Mapping[int, int] | None = None,
    journal: Journal | None = None,
) -> list[Row]:
    """Take units out of the model in place.

    Args:
        architecture: from `adapt(model)`; its model, `blocks` and `stored` change.
        tokens: (W, L) int64 calibration windows; None where nothing is looked at (`Order.looks`).
        prices: what `row_prices` returned; None: it is asked where it is needed.
        widths: layer -> channels that it keeps, where layers differ.
        leaving: what `chosen_blocks` returned for as many blocks or more; empty: it is asked.
        journal: keeps what is done.

    Returns:
        A row for each layer and axis, named after the layers of the dense model.

    Raises:
        ValueError: activations, Hessians or prices that are not finite, with the block's name.
    """
    if order.looks and tokens is None:
        raise ValueError("structured removal needs calibration windows, but none were given")
    journal = journal or Forgetful(architecture)
    stage = journal.stage("shrink")
    rows = Rows(stage)
    inner = [axis for axis in INNER if axis in order.sizes]
    priced = order.priced and any(order.methods[axis].prices for axis in inner)
    if not priced or tokens is None:
        prices = {}
    elif prices is None:
        prices = row_prices(architecture, tokens, progress, journal)
    count = len(architecture.blocks) - order.sizes.get("block", len(architecture.blocks))
    gone = list(leaving[:count])
    if len(leaving) < count:
        gone = journal.once("blocks", lambda: chosen_blocks(architecture, order, tokens, progress))
    first = []
    if count:
        chosen = order.methods["block"].name
        first = [_row("blocks", -1, "block", chosen, len(architecture.blocks), len(gone), order.repair)]
    if widths is not None:  # also if what follows is interrupted
        guard(architecture.model)
    refits = [order.refits(block) for block in architecture.blocks]

    def sizes(index: int) -> Mapping[str, int]:
        return {"channel": widths[index]} if widths else order.sizes

    for index in stage.left:
        if index not in gone:
            _restore(architecture, stage, index, {axis: sizes(index)[axis] for axis in inner})
    if inner or (gone and order.strength):
        looked = tokens if order.looks else None
        dense = None
        if looked is not None and any(refits):
            dense = Stream.of(architecture, looked, stage, "dense")
        steps = Steps("shrink", len(architecture.blocks) - len(gone), progress)
        for stop in walk(architecture, looked, dense=dense, without=gone, stage=stage, note=rows.new):
            with naming(stop.block.name):
                asked = replace(order, sizes=sizes(stop.block.index))
                rows.all += _shrink_block(architecture, stop, asked, inner, prices, refits[stop.block.index])
                architecture.ranks.spread(list(stop.block.layer.parameters()))
            steps()
    for index in sorted(gone, reverse=True):
        architecture.drop(index)
    if widths is None:
        architecture.settle(architecture.fields({axis: order.sizes[axis] for axis in inner}))
    else:
        level(architecture.model)
    return [*first, *rows.all]


def _restore(architecture: Architecture, stage: Stage, index: int, sizes: Mapping[str, int]) -> None:
    """Put a block that an earlier run shrank into its place."""
    block = architecture.blocks[index]
    names = {axis.name for axis in block.axes}
    if own := {axis: size for axis, size in sizes.items() if axis in names}:
        block = architecture.resize(block, architecture.fields(own), stage.tensors(block))
    stage.restore(block)


def _row(
    target: str,
    layer: int,
    axis: str,
    method: str,
    total: int,
    pruned: int,
    repair: str = "none",
    price: str = "none",
    repaired: Iterable[str] = (),
) -> Row:
    return Row(
        target=target,
        layer=layer,
        family=axis,
        method=method,
        pattern=f"structured:{axis}",
        removed="cut",
        total=total,
        pruned=pruned,
        repair=repair,
        price=price,
        repaired=tuple(repaired),
    )


def _shrink_block(
    architecture: Architecture,
    stop: Stop,
    order: Order,
    inner: Sequence[str],
    prices: Mapping[str, Tensor],
    refits: bool,
) -> list[Row]:
    """Look, choose, cut and repair one block."""
    rows = []
    goals = {kind: target.matrix.clone() for kind, target in _linear(stop.block).items()}
    before = [kind for kind in REPAIRED if kind in goals]
    if refits and before[:1] == ["in_proj"]:
        _repair(stop, "in_proj", goals["in_proj"], order.strength)
    done: dict[str, int] = {}
    for axis in inner:
        axes = [a for a in stop.block.axes if a.name == axis]
        if not axes:  # a layer of a hybrid that has no mixer
            continue
        removing = axes[0].size - order.sizes[axis]
        units = look(stop, axis, axes, removing, order, prices)
        selection = order.methods[axis]
        counts = sum(a.size for a in axes), removing * len(axes)
        assert selection.score is not None
        values = selection.score(units)
        if any(value.isnan().any() for value in values):
            raise ValueError(f"method {selection.name!r} gave a score that is not a number")
        keeps = architecture.ranks.given([PATTERN.keep(value, removing) for value in values])
        keeps = [keep.to(value.device) for keep, value in zip(keeps, values, strict=True)]
        mixes = _mixes(stop, axes, units, keeps, prices) if units.mixable else None
        done[axis] = order.sizes[axis]
        stop.replace(_resized(architecture, stop.block, axes, keeps, mixes, goals, done, order.strength > 0))
        repaired = [target.name for target in _linear(stop.block).values()] if refits else []
        rows.append(
            _row(
                f"{stop.block.name}.{axis}",
                stop.block.index,
                axis,
                selection.name,
                *counts,
                repair=order.repair if refits or mixes else "none",
                price="fisher" if prices and selection.prices else "none",
                repaired=repaired
                or dict.fromkeys(f"{stop.block.name}.{part.tensor}" for part in mixes or ()),
            )
        )
    if refits:
        for kind in before[1:]:
            _repair(stop, kind, goals[kind], order.strength)
    return rows


def _linear(block: Block) -> dict[str, Target]:
    return {target.kind: target for target in block.targets if target.kind in REPAIRED}


def _tensor(block: Block, target: Target) -> str:
    """A target's name inside its layer."""
    return target.name.removeprefix(f"{block.name}.")


def look(
    stop: Stop,
    axis: str,
    axes: Sequence[Axis],
    removing: int,
    order: Order,
    prices: Mapping[str, Tensor],
) -> Units:
    """What a selection needs to know."""
    block, selection = stop.block, order.methods[axis]
    tensors = block.layer.state_dict()
    units = Units(
        [a.size for a in axes],
        removing,
        weights=[_entries(tensors, a) for a in axes] if selection.weighs else (),
        mixable=order.strength > 0 and axis == "state" and mixable(axes),
        seed=seed_of(order.seed, f"{block.name}.{axis}"),
        device=next(block.layer.parameters()).device,
    )
    looks = selection.looks.get(axis, "")
    linear = _linear(block)
    if looks == "states" or units.mixable:
        price = price_of(prices, linear["out_proj"])
        units = replace(units, states=_states(stop, lambda every: StateMoments(every, price)))
    if looks == "energy":
        channels = linear["out_proj"].matrix.shape[1]
        watching, rows = StateReadout(), max(1, HELD // (4 * channels * axes[0].size))
        stop.run({"states": watching}, until="states", rows=rows)
        units = replace(units, energy=stop.result(watching))
    if looks == "votes":
        a_log = block.target("A_log").matrix
        observer = ColumnVote(a_log, removing)
        stop.run({"A_log": observer}, until="A_log")
        units = replace(units, votes=stop.result(observer))
    if looks == "inputs":
        readers = []
        for kind in ("x_proj", "out_proj"):
            if kind not in linear:
                continue
            target = linear[kind]
            name = _tensor(block, target)
            columns = torch.cat([_columns(a, name) for a in axes]).to(target.matrix.device)
            seen = _seen(stop, kind, InputGram())
            readers.append(Reader(target.matrix, price_of(prices, target), seen, columns))
        units = replace(units, readers=readers)
    return units


def _mixes(
    stop: Stop, axes: Sequence[Axis], units: Units, keeps: Sequence[Tensor], prices: Mapping[str, Tensor]
) -> dict[Part, Tensor]:
    """Rows that make up for the states that go: part of a tensor -> its new rows, mixtures of the old ones.

    Where there are too many states for sums over pairs of pairs, the readouts alone.
    """
    assert units.states is not None and units.states.full is not None
    (axis,), (keep,), (full,) = axes, keeps, units.states.full
    assert axis.write is not None and axis.read is not None
    read = readout(full, keep)
    kept, gone = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    pairs = len(kept) * axis.size + len(gone)
    if pairs > MAX_STATES:
        return {axis.read: read.T}
    decays = torch.cat([kept.repeat_interleave(axis.size), gone])
    inputs = torch.cat([torch.arange(axis.size, device=keep.device).repeat(len(kept)), gone])
    price = price_of(prices, _linear(stop.block)["out_proj"])
    pairs_seen = _states(stop, lambda every: PairMoments(every, decays, inputs, price))
    write, read = remix(pairs_seen, keep, read)
    return {axis.write: write, axis.read: read.T}


def price_of(prices: Mapping[str, Tensor], target: Target) -> Tensor | None:
    """Of a target's rows, where its weights are."""
    return prices[target.name].to(target.matrix.device) if target.name in prices else None


def _entries(tensors: Mapping[str, Tensor], axis: Axis) -> Tensor:
    """(units, entries): all weights of matrices that belong to each unit."""
    found = []
    for part in axis.parts:
        tensor = tensors[part.tensor].movedim(part.dim, 0)
        if tensor.ndim > 1:
            rows = tensor[part.start : part.start + axis.size * part.width]
            found.append(rows.reshape(axis.size, -1))
    return torch.cat(found, 1)


def _columns(axis: Axis, tensor: str) -> Tensor:
    """(units, width): the columns of a matrix that each unit feeds."""
    parts = [part for part in axis.parts if part.tensor == tensor and part.dim == 1]
    starts = torch.arange(axis.size)[:, None]
    return torch.cat([part.start + starts * part.width + torch.arange(part.width) for part in parts], 1)


def _states(stop: Stop, observer: Callable[[int], Any]) -> Any:
    """What an observer of states sees; it is made for a number of steps."""
    watching = observer(min(EVERY, slab_width(stop.hidden.shape[1])))
    stop.run({"states": watching}, until="states")
    return stop.result(watching)


def _seen(stop: Stop, kind: str, observer: InputGram) -> Moments:
    stop.run({kind: observer}, until=kind)
    return stop.result(observer)


def _repair(stop: Stop, kind: str, goal: Tensor, strength: float) -> None:
    """Fit a matrix to what it put out in the dense model, where it may have had more inputs."""
    target = _linear(stop.block)[kind]
    seen = _seen(stop, kind, InputGram(paired=True))
    seen, _ = seen.scaled(goal.dtype)
    factor = factorise(seen.gram)
    fitted = dense_target(goal, seen, factor, strength, start=target.matrix)
    if not torch.isfinite(fitted).all():
        raise ValueError(f"{kind}: the repaired weights are not finite")
    target.replace(fitted)


def _resized(
    architecture: Architecture,
    block: Block,
    axes: Sequence[Axis],
    keeps: Sequence[Tensor],
    mixes: Mapping[Part, Tensor] | None,
    goals: dict[str, Tensor],
    sizes: Mapping[str, int],
    repairing: bool,
) -> Block:
    """The block without some units; rows of `goals` follow, their columns stay those of the dense model."""
    linear = _linear(block)
    tensors = {name: tensor.detach() for name, tensor in block.layer.state_dict().items()}
    smaller = cut(tensors, axes, keeps)
    by_tensor = {_tensor(block, target): kind for kind, target in linear.items()}
    rows = [replace(a, parts=tuple(p for p in a.parts if p.dim == 0 and p.tensor in by_tensor)) for a in axes]
    named = {name: goals[kind] for name, kind in by_tensor.items()}
    goal = cut(named, rows, keeps)
    for part, mix in (mixes or {}).items():
        was = slice(part.start, part.start + mix.shape[1])
        # the states' other rows of the same tensor that lie before got fewer too
        fewer = mix.shape[1] - mix.shape[0]
        before = sum((p.tensor, p.dim) == (part.tensor, 0) and p.start < part.start for p in axes[0].parts)
        now = slice(part.start - fewer * before, part.start - fewer * before + mix.shape[0])
        for old, new in ((tensors, smaller), (named, goal)):
            new[part.tensor] = new[part.tensor].clone()
            mixed = mix.to(old[part.tensor].dtype) @ old[part.tensor][was]
            if new is smaller:
                stored = architecture.stored.get(f"{block.name}.{part.tensor}", mixed.dtype)
                mixed = rounded(mixed, stored).to(mixed.dtype)
            new[part.tensor][now] = mixed
    goals |= {kind: goal[name] for name, kind in by_tensor.items()}
    for name in {p.tensor for a in axes for p in a.parts if repairing and p.tensor.endswith("norm.weight")}:
        # A norm's mean over fewer channels is larger, though those that went were the weak ones.
        if axes[0].name in ("head", "channel"):
            share = smaller[name].numel() / tensors[name].numel()
            stored = architecture.stored.get(f"{block.name}.{name}", smaller[name].dtype)
            smaller[name] = rounded(smaller[name] / share**0.5, stored).to(smaller[name].dtype)
    return architecture.resize(block, architecture.fields(sizes), smaller)
