"""Stage 1, what the calibration windows say too little of: an expert's moments, drawn towards its layer's.

An expert sees only the tokens that its router sends it, maybe none. The mean S of x x' over n tokens strays
from what more of them would give by about (tr(S)^2 + |S|^2) / n in squares, of Gaussian inputs. The layer's T
is somewhere else altogether: |S - T|^2 says how far, S's straying included. S + rho (T - S) is nearest to the
truth with rho = the first over the second, at most 1 (Ledoit and Wolf, J. Multivariate Analysis 88, 2004; of
Gaussian inputs Chen et al., arXiv 0907.4698). It falls as 1 / n: who is well fed borrows next to nothing.

T depends on what a matrix reads. All experts' first matrices read the stream: T is the mean over all tokens
of the layer, which is that of the experts, weighted by their tokens. The second ones read channels that each
expert has of its own, and of those of others only the size says something: T is the identity times their
mean square; so is that of the first ones, as far as the whole layer saw little. Formulas in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsessm.methods.observers import InputGram, InputNorm, Moments


def of_layer(observers: Sequence[Any], shared: bool) -> InputGram | InputNorm | None:
    """What watches all tokens of a layer, for experts that these watch; None if they borrow nothing.

    Args:
        shared: they read the same channels.
    """
    grams = [one for one in observers if isinstance(one, InputGram)]
    if grams and shared:
        return InputGram(paired=any(one.paired for one in grams))
    return InputNorm() if grams or any(isinstance(one, InputNorm) for one in observers) else None


def settled(layer: Moments, shared: bool) -> Moments:
    """What a layer lends: its moments, drawn likewise towards the identity times their mean square, as all of
    it may have seen little.

    Args:
        layer: what `of_layer` saw. shared: all experts read the same channels; else only the size is lent.
    """
    if not layer.tokens or not shared:
        return layer
    alike = layer.power.mean().expand_as(layer.power)
    goal = alike if layer.diagonal else alike.diag()
    share = _share(layer, goal)
    cross = None if layer.cross is None else _between(layer.cross, goal, share)
    return replace(layer, gram=_between(layer.gram, goal, share), cross=cross)


def drawn(own: Moments, layer: Moments, width: int, shared: bool) -> Moments:
    """The moments of an expert, drawn towards those of its layer by as much as they may stray.

    Args:
        own: of the tokens that it saw, maybe none. layer: what is lent (`settled`).
        width: inputs of its matrix. shared: all experts read the same channels.

    Returns:
        float64; `borrowed` is rho. Where the layer saw nothing either, all inputs are alike: the identity.
    """
    goal = _goal(layer, width, shared, own.diagonal)
    cross_goal = layer.cross if shared and layer.tokens and layer.cross is not None else goal
    if not own.tokens:
        # which kind it would have been is not known, as nothing was added up: who needs no cross reads none
        return Moments(goal, None if own.diagonal else cross_goal, own.diagonal, own.tokens, borrowed=1.0)
    share = _share(own, goal)
    cross = None if own.cross is None else _between(own.cross, cross_goal, share)
    return replace(own, gram=_between(own.gram, goal, share), cross=cross, borrowed=share)


def _share(seen: Moments, goal: Tensor) -> float:
    """rho, of moments that some tokens gave."""
    assert seen.tokens
    norm = torch.linalg.vector_norm
    power = seen.gram.square().sum() if seen.diagonal else seen.gram.trace() ** 2
    strays = (power + norm(seen.gram) ** 2) / seen.tokens
    distance = norm(goal - seen.gram) ** 2
    return 1.0 if strays >= distance else float(strays / distance)


def _between(seen: Tensor, goal: Tensor, share: float) -> Tensor:
    return (goal - seen).mul_(share).add_(seen)


def _goal(layer: Moments, width: int, shared: bool, diagonal: bool) -> Tensor:
    """T, (in, in) or its diagonal."""
    if shared and layer.tokens:
        return layer.power if diagonal else layer.gram
    size = layer.power.mean() if layer.tokens else torch.ones((), dtype=torch.float64)
    alike = size.to(layer.gram.device).expand(width)
    return alike if diagonal else alike.diag()
