"""From a recipe with a structured pattern to an `Order`: how many units of which axis stay, chosen how.

Place in the flow: what rules.py is for single entries. Sizes are those that transformers can express; what
is impossible is refused here, before any work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsessm.architectures import Architecture, Axis, Block
from sparsessm.methods import UNITS_DEFAULT, unit_methods
from sparsessm.methods.observers import StateMoments
from sparsessm.methods.patterns import AXES, Structured, parse
from sparsessm.methods.structured import UnitMethod
from sparsessm.recipe.fits import differs, parse_repair
from sparsessm.recipe.recipe import DEFAULT_SPARSITY, Recipe

MULTIPLE = 16  # of channels, which hardware likes
INNER = ("channel", "head", "state")  # the axes inside a layer, in the order in which it loses units
# The matrices of a mixer that a repair fits, in the order of the data.
REPAIRED = ("in_proj", "x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True)
class Order:
    """What is to be taken out.

    Attributes:
        sizes: axis -> units that stay, of each of its axes in a layer (of "block": blocks). Empty if `share`
            of the parameters is to go, and how is still to be found (pruning/mixes.py).
        methods: axis -> how they are chosen. strength: of the repair, 0 is none. asked: the recipe says
            which.
        by_layer: every layer keeps as many as it needs, `sizes` on average; for our runtime alone.
        priced: errors cost what the loss says. seed: of random choices.
    """

    sizes: Mapping[str, int]
    methods: Mapping[str, UnitMethod]
    strength: float = 1.0
    asked: bool = False
    by_layer: bool = False
    priced: bool = True
    seed: int = 0
    share: float | None = None

    @property
    def looks(self) -> bool:
        """Whether calibration windows are needed."""
        return (
            self.share is not None
            or self.strength > 0
            or any(self.methods[axis].looks for axis in self.sizes)
        )

    def refits(self, block: Block) -> bool:
        """Whether the matrices of a block are fitted to the dense model's outputs.

        After states alone went, unless the recipe asks for it, only where Mamba-1 has states that cannot be
        mixed: elsewhere it makes the result worse (docs/structured.md).
        """
        if not self.strength:
            return False
        if self.asked or self.sizes.keys() != {"state"}:
            return True
        own = any(target.kind == "x_proj" for target in block.targets)
        return own and not mixable([a for a in block.axes if a.name == "state"])

    @property
    def repair(self) -> str:
        """What survivors restore, as a recipe says it."""
        return f"dense-target:{self.strength:g}" if self.strength else "none"

    @property
    def names(self) -> list[str]:
        """Names of the methods."""
        return list(dict.fromkeys(self.methods[axis].name for axis in self.sizes or self.methods))


def order(recipe: Recipe, architecture: Architecture) -> Order:
    """What a recipe with a structured pattern asks of a model.

    Raises:
        ValueError: an axis that the model lacks, a share that transformers cannot express, or a method
            that does not choose units of the axis.
    """
    pattern = parse(recipe.pattern or "")
    assert isinstance(pattern, Structured)
    share = DEFAULT_SPARSITY if recipe.sparsity is None else recipe.sparsity
    known = unit_methods()
    method = known[recipe.method or UNITS_DEFAULT]
    if method.projects and not architecture.projects:
        kind = f"this is a {type(architecture).__name__}"
        why = "the states of this one are projected already" if type(architecture).projects else kind
        raise ValueError(f"method {method.name!r} projects the states of Mamba-2 models; {why}")
    axes = [axis for axis, _ in pattern.shares] or [a for a in AXES if a in architecture.structure]
    if not axes:
        raise ValueError(
            f"pattern '{pattern}': a {type(architecture).__name__} model has no units that can be removed"
        )
    by_layer = differs(recipe.chosen)
    if by_layer and not architecture.widens:
        kind = type(architecture).__name__
        why = "this one has them already" if type(architecture).widens else f"this is a {kind}"
        raise ValueError(
            f"allocation {recipe.allocation!r} gives layers of a Mamba-1 different widths; {why}"
        )
    if not pattern.shares and type(architecture).widens and not architecture.widens:
        raise ValueError("pattern 'structured': layers have different widths; use pattern 'structured:block'")
    free = 1 if method.projects else width_step(size_of(architecture, "channel")) if by_layer else None
    sizes = {
        axis: size_for(architecture, axis, share if own is None else own, free)
        for axis, own in pattern.shares
    }
    try:
        for last in range(1, len(INNER) + 1):  # a layer loses them one after the other
            architecture.fields({axis: sizes[axis] for axis in INNER[:last] if axis in sizes})
    except ValueError as error:
        raise ValueError(f"pattern '{pattern}': {error}") from None
    for axis in axes:
        if axis not in method.axes:
            others = ", ".join(name for name, row in known.items() if axis in row.axes)
            raise ValueError(f"method {method.name!r} does not support axis {axis!r}; these do: {others}")
    if "votes" in method.looks.values() and any(
        target.kind == "A_log" and target.matrix.shape[1] == 1 for target in architecture.targets
    ):
        raise ValueError(f"method {method.name!r} needs one decay for each state; only Mamba-1 has that")
    name, strength = parse_repair(recipe.repair or "dense-target")
    found = Order(
        sizes,
        dict.fromkeys(axes, method),
        strength=0.0 if name == "none" or method.projects else strength,
        asked=recipe.repair is not None,
        by_layer=by_layer,
        priced=recipe.price != "none",
        seed=recipe.seed,
        share=None if pattern.shares else share,
    )
    states = [a for block in architecture.blocks for a in block.axes if a.name == "state"]
    if sizes.keys() != {"state"} or mixable(states) or any(map(found.refits, architecture.blocks)):
        return found
    return replace(found, strength=0.0)  # nothing could be changed to make up for what goes


def mixable(axes: Sequence[Axis]) -> bool:
    """Whether the inputs or readouts of states that stay can be replaced by mixtures of all."""
    return all(a.read is not None and a.size <= StateMoments.MOST_FULL for a in axes)


def size_of(architecture: Architecture, axis: str) -> int:
    """Units of an axis in every layer now, of each of a layer's axes of that name; of "block": blocks."""
    if axis == "block":
        return len(architecture.blocks)
    return next(a.size for block in architecture.blocks for a in block.axes if a.name == axis)


def possible(architecture: Architecture, axis: str) -> list[int]:
    """The sizes below the present one that an axis can have, ascending: those transformers can express,
    and of channels multiples of 16 where there are that many."""
    sizes = architecture.sizes(axis)
    if axis == "channel" and size_of(architecture, axis) >= 2 * MULTIPLE:
        sizes = [size for size in sizes if size % MULTIPLE == 0]
    return sizes


def width_step(channels: int) -> int:
    """By how many channels layers of different widths differ."""
    return MULTIPLE if channels >= 2 * MULTIPLE and channels % MULTIPLE == 0 else 1


def size_for(architecture: Architecture, axis: str, share: float, step: int | None = None) -> int:
    """The number of units that stay when about this share of an axis goes.

    Args:
        step: stock code has no say in it; any multiple of this can go, and one goes and stays at least.

    Raises:
        ValueError: the architecture has no such axis, or nothing near this share is possible; says what is.
    """
    kind = type(architecture).__name__
    if axis not in architecture.structure and axis in type(architecture).structure:
        why = "projected states" if type(architecture).projects else "layers of different widths"
        raise ValueError(f"pattern 'structured:{axis}': only blocks can be removed from a model with {why}")
    if axis not in architecture.structure:
        allowed = ", ".join(architecture.structure) or "none"
        raise ValueError(
            f"pattern 'structured:{axis}': a {kind} model does not support it; supported axes: {allowed}"
        )
    now, sizes = size_of(architecture, axis), possible(architecture, axis)
    wanted = (1 - share) * now
    if step and now > step:
        return min(max(1, round(wanted / step)), now // step - 1) * step
    best = min(sizes, key=lambda size: abs(size - wanted), default=math.inf)
    slack = max(0.5, min(MULTIPLE / 2, now / 16)) if axis == "channel" else 0.5
    if abs(best - wanted) > max(slack, 0.05 * now):
        some = sizes[:: max(1, len(sizes) // 12)]
        shares = ", ".join(f"{1 - size / now:.3g}" for size in reversed(some))
        raise ValueError(
            f"sparsity {share:g} of axis {axis!r}: transformers cannot express {share:g} of {now} units; "
            f"possible shares: {shares or 'none'}"
        )
    return int(best)
