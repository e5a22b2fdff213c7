"""Stage 2 for whole units: which states, channels or heads of a layer matter least.

A method for units sees weights and sums, never a model, like the methods for single entries. Its scores are
ranks or costs: the smallest go, the same number in every layer (`patterns.Structured`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm.methods.exact import elimination_scores
from sparsessm.methods.hessian import factorise
from sparsessm.methods.observers import Moments, StateSums
from sparsessm.methods.repair import readout, readout_error

ROUNDS = 512  # steps in which `exact` takes channels out, at most: more at once where there are more


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the units: it loses columns, and the rest is repaired by least squares.

    Attributes:
        weight: (out, in). prices: (out,) what an error in each row costs. seen: moments of its inputs.
        columns: (units, width) int64, the columns of each unit.
    """

    weight: Tensor
    prices: Tensor | None
    seen: Moments
    columns: Tensor


@dataclass(frozen=True)
class Units:
    """The axes of one name of one layer, and what is known of them.

    Attributes:
        sizes: units of each axis. removing: units that each axis loses.
        weights: the layer's tensors that share the axes: (units, entries) of each axis.
        states: sums over the states, for axis "state". energy: (G, N) what each puts out, `StateReadout`.
            votes: (N,) votes that each got, `ColumnVote`. readers: matrices that read the units, for
            "channel" and "head".
        mixable: the readouts of the kept states can be replaced by any mixture of all.
        seed: of this layer. device: where scores are made.
    """

    sizes: Sequence[int]
    removing: int
    weights: Sequence[Tensor] = ()
    states: StateSums | None = None
    energy: Tensor | None = None
    votes: Tensor | None = None
    readers: Sequence[Reader] = ()
    mixable: bool = False
    seed: int = 0
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class UnitMethod:
    """One way to decide which units go.

    Attributes:
        name, paper, summary: as of an `EntryMethod`. axes: those it applies to.
        looks: what it needs to see: "states", "energy", "votes", "inputs", "loss", "change", or nothing ("").
        score: units -> scores of each axis; the smallest are removed. None: the loop asks the model (blocks).
        weighs: it reads the weights of the units. prices: an error in an output row costs what the loss says,
            unless the recipe says otherwise.
        eliminates: it takes units out one after the other and knows what each step costs, so that layers may
            keep different numbers of channels (pruning/widths.py).
        projects: it does not choose, it projects the states (pruning/projection.py).
    """

    name: str
    paper: str
    summary: str
    axes: tuple[str, ...]
    looks: Mapping[str, str]
    score: Callable[[Units], Sequence[Tensor]] | None = None
    weighs: bool = False
    prices: bool = False
    eliminates: bool = False
    projects: bool = False


def _random(units: Units) -> Sequence[Tensor]:
    random = torch.Generator().manual_seed(units.seed)
    # Drawn on the CPU: the same choice on every device.
    return [torch.rand(n, generator=random, dtype=torch.float64).to(units.device) for n in units.sizes]


def _magnitude(units: Units) -> Sequence[Tensor]:
    return [weight.double().square().sum(1) for weight in units.weights]


def _ghost(units: Units) -> Sequence[Tensor]:
    assert units.energy is not None
    return units.energy.sqrt().unbind()


def _vote(units: Units) -> Sequence[Tensor]:
    assert units.votes is not None
    return [-units.votes.double()]


def _exact(units: Units) -> Sequence[Tensor]:
    if units.readers:
        return eliminate(units)
    assert units.states is not None
    if units.mixable and units.states.full is not None:
        return [mixed_elimination(full, units.removing) for full in units.states.full]
    scores = [
        elimination_scores(gram[None], units.sizes[0], max(units.removing, 1))[0]
        for gram in units.states.gram
    ]
    return scores


def mixed_elimination(full: Tensor, removing: int) -> Tensor:
    """Greedy elimination of states, each step counting what the best readouts of the rest can restore.

    Args:
        full: (N, N, N, N), `StateSums.full` of one group. removing: states to go.

    Returns:
        (N,) float64: the order in which they go; infinite for those that stay.
    """
    states = full.shape[0]
    keep = torch.ones(states, dtype=torch.bool, device=full.device)
    scores = torch.full((states,), torch.inf, dtype=torch.float64, device=full.device)
    for turn in range(removing):
        errors = torch.full_like(scores, torch.inf)
        for state in keep.nonzero()[:, 0].tolist():
            keep[state] = False
            errors[state] = readout_error(full, keep, readout(full, keep))
            keep[state] = True
        worst = int(errors.argmin())
        keep[worst], scores[worst] = False, turn
    return scores


def eliminate(units: Units) -> Sequence[Tensor]:
    """Greedy elimination of columns that several matrices read, each repaired by least squares after a step.

    Optimal brain surgery by whole groups of columns (Hassibi & Stork 1993; ZipLM, Kurtic et al., arXiv
    2302.04089): removing the columns g of W costs tr W_g ([H^-1]_gg)^-1 W_g', after which W and H^-1 are
    those of the rest.

    Returns:
        Of each axis (units,) float64: the order in which they go; infinite for those that stay.
    """
    return elimination(units)[0]


def elimination(units: Units) -> tuple[Sequence[Tensor], Tensor]:
    """As `eliminate`, and beside it what each step costs, in the order in which they are taken."""
    sizes = torch.tensor(units.sizes, device=units.device)
    owner = torch.arange(len(sizes), device=units.device).repeat_interleave(sizes)  # (units,): axis of each
    total = len(owner)
    problems = []
    for reader in units.readers:
        weight = reader.weight.double()
        if reader.prices is not None:
            weight = weight * reader.prices.double().clamp(min=0).sqrt()[:, None]
        upper = factorise(reader.seen.gram.double()).upper
        problems.append((weight.clone(), upper.mT @ upper, reader.columns))
        del upper  # as large as the inverse
    scores = torch.full((total,), torch.inf, dtype=torch.float64, device=units.device)
    left = torch.full_like(sizes, units.removing)
    open_ = torch.ones(total, dtype=torch.bool, device=units.device)
    several = max(1, total // ROUNDS)
    steps: list[float] = []
    while bool((left > 0).any()):
        costs = sum((_costs(*problem) for problem in problems), torch.zeros_like(scores))
        costs[~open_ | (left[owner] == 0)] = torch.inf
        chosen = []
        for unit in costs.argsort()[:several].tolist():
            axis = int(owner[unit])
            if left[axis] == 0 or not torch.isfinite(costs[unit]):
                continue
            left[axis] -= 1
            open_[unit], scores[unit] = False, len(steps)
            chosen.append(unit)
            steps.append(float(costs[unit]))
        if not chosen:  # nothing is finite: weights that are not
            raise ValueError("the cost of removing a unit is not finite")
        for weight, inverse, columns in problems:
            gone = columns[chosen].flatten()
            solved = torch.linalg.solve(inverse[gone[:, None], gone], inverse[gone])  # (gone, in)
            weight.addmm_(weight[:, gone], solved, alpha=-1)
            inverse.addmm_(inverse[:, gone], solved, alpha=-1)
            inverse[gone] = 0.0
            inverse[:, gone] = 0.0
            inverse[gone, gone] = 1.0  # so that what is gone stays solvable; it is never chosen again
    return scores.split(units.sizes), scores.new_tensor(steps)


def _costs(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """(units,): what removing each unit's columns costs after the best repair."""
    if columns.shape[1] == 1:
        flat = columns[:, 0]
        return (weight.square().sum(0) / inverse.diagonal())[flat]
    parts = weight[:, columns].movedim(1, 0)  # (units, out, width)
    blocks = inverse[columns[:, :, None], columns[:, None, :]]  # (units, width, width)
    return (parts.mT * torch.linalg.solve(blocks, parts.mT)).sum((1, 2))


random = UnitMethod(
    "random", "baseline", "units drawn at random", ("state", "channel", "head", "block"), {}, _random
)
magnitude = UnitMethod(
    "magnitude",
    "Han et al. 2015",
    "norm of all weights of a unit",
    ("state", "channel", "head"),
    {},
    _magnitude,
    weighs=True,
)
vote = UnitMethod(
    "sparsessm-vote",
    "SparseSSM v1, arXiv 2506.09613",
    "vote per time step on A_log^2 S_t, summed over each column",
    ("state",),
    {"state": "votes"},
    _vote,
)
ghost = UnitMethod(
    "ghost",
    "GHOST, arXiv 2602.11408",
    "root of E[h^2 C^2]: how much a state and its readout carry",
    ("state",),
    {"state": "energy"},
    _ghost,
)
change = UnitMethod(
    "cosine",
    "Men et al., arXiv 2403.03853",
    "1 - cosine between a block's input and output in the dense model",
    ("block",),
    {"block": "change"},
)
balanced = UnitMethod(
    "balanced",
    "balanced truncation, Moore 1981",
    "Mamba-2: the best directions instead of states, for our runtime only",
    ("state",),
    {"state": "states"},
    projects=True,
)
exact = UnitMethod(
    "exact",
    "ours; docs/methods.md",
    "output error (loss, for blocks) after the best repair, greedy",
    ("state", "channel", "head", "block"),
    {"state": "states", "channel": "inputs", "head": "inputs", "block": "loss"},
    _exact,
    prices=True,
    eliminates=True,
)
