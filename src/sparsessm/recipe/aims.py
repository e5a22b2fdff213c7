"""What bits and a size mean for one model: which matrices take part, and how many bits a weight a size is.

Place in the flow: between a resolved recipe and its rules (rules.py).
"""

from __future__ import annotations

from sparsessm.architectures import Architecture
from sparsessm.data.foreign import bytes_of

from .fits import LEAST_BITS, MOST_BITS
from .recipe import Recipe
from .rules import assign

OUTER = 0.1  # of the bytes: where embedding and head are more, they take part
# Bytes that the header of a packed file takes for a tensor, and for one on a grid.
PLAIN, CODED = 250, 800
NEAR = 0.005  # of the bits: a size is met within a hundredth


def aimed(recipe: Recipe, architecture: Architecture) -> Recipe:
    """The recipe with the target that bits or a size have on this model, and with bits in place of the size.

    Args:
        recipe: resolved.

    Raises:
        ValueError: no number of bits that is allowed gives the size; says which sizes there are.
    """
    if recipe.bits is None and recipe.size is None:
        return recipe
    if recipe.target is None and not recipe.rules:
        target = "matrices" if outer_share(architecture) > OUTER else "projections"
        recipe = recipe.updated(target=target)
    if recipe.size is None:
        return recipe
    bits = bits_of(recipe.size, recipe.updated(bits=MOST_BITS), architecture)
    return recipe.updated(bits=bits)


def outer_share(architecture: Architecture) -> float:
    """Share of the checkpoint's bytes that are embedding and head."""
    outer = sum(target.matrix.numel() * target.stored.itemsize for target in architecture.tail.targets)
    return outer / sum(_sizes(architecture).values())


def _sizes(architecture: Architecture) -> dict[str, int]:
    """Bytes of each parameter in the checkpoint, tied ones once."""
    dtypes = {id(target.parameter): target.stored for target in architecture.targets}
    return {
        # a tied one may be stored under its other name, which its target knows
        name: parameter.numel()
        * architecture.stored.get(name, dtypes.get(id(parameter), parameter.dtype)).itemsize
        for name, parameter in architecture.model.named_parameters()
    }


def bits_of(size: str, recipe: Recipe, architecture: Architecture) -> float:
    """Stored bits a weight with which the packed file takes so many bytes.

    Args:
        recipe: with any number of bits.

    Raises:
        ValueError: as `aimed`.
    """
    rest, entries = _filled(recipe, architecture)
    bits = 8 * (bytes_of(size, "size") - rest) / entries
    if LEAST_BITS * (1 - NEAR) <= bits <= MOST_BITS * (1 + NEAR):
        return min(max(bits, LEAST_BITS), MOST_BITS)
    low, high = (f"{(rest + end * entries / 8) / 1e6:.4g}MB" for end in (LEAST_BITS, MOST_BITS))
    raise ValueError(
        f"size is {size}, which is {bits:.3g} bits a weight in target {recipe.target!r}; this model can take "
        f"{low} to {high} ({LEAST_BITS:g} to {MOST_BITS:g} bits)"
        + ("; with target matrices the head takes part" if recipe.target == "projections" else "")
    )


def bits_within(nbytes: int, recipe: Recipe, architecture: Architecture) -> float:
    """Stored bits a weight at which the packed file takes so many bytes, of any number of bytes: it may be
    less, or more, than a recipe can ask for.

    Args:
        recipe: with a target and any number of bits.
    """
    rest, entries = _filled(recipe, architecture)
    return 8 * (nbytes - rest) / entries


def bytes_at(bits: float, recipe: Recipe, architecture: Architecture) -> int:
    """The reverse of `bits_within`."""
    rest, entries = _filled(recipe, architecture)
    return round(rest + bits * entries / 8)


def _filled(recipe: Recipe, architecture: Architecture) -> tuple[int, int]:
    """Bytes of the packed file that are not of the targets' weights, and how many weights these are."""
    rules = assign(recipe, architecture.targets).rules
    targets = [target for target in architecture.targets if target.name in rules]
    coded = {id(target.parameter) for target in targets}
    parameters = dict(architecture.model.named_parameters())
    rest = sum(
        PLAIN + size for name, size in _sizes(architecture).items() if id(parameters[name]) not in coded
    )
    rest += CODED * len(targets)
    return rest, sum(target.matrix.numel() for target in targets)
