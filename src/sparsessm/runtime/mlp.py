"""MLPs, mixtures of experts and plain matrices in the native engine.

Place in the flow: parts (part.py) without a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.checkpoint.stacked import matrices_of
from sparsessm.runtime import plan
from sparsessm.runtime.keys import Reading
from sparsessm.runtime.part import Linear, Part, Place, Products, native_of
from sparsessm.runtime.weights import Weights, matrices, matrix

CURVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}
"""Activations, by the decoder's names."""


@final
class Plain(Part):
    """A matrix alone."""

    def __init__(self, told: plan.Plain, products: Products, place: Place) -> None:
        super().__init__(place)
        self._linear = products.one(told.product)

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        return self._linear(x)

    def native(self) -> dict[str, Any]:
        """As `Part.native`."""
        return self.place.native() | {"kind": "linear", "linear": self._linear.native()}

    @property
    def nbytes(self) -> int:
        """As `Part.nbytes`."""
        return _nbytes(self.place, self._linear)

    def held(self) -> Iterator[Any]:
        """As `Part.held`."""
        yield from _held(self.place, self._linear)


@final
class Mlp(Part):
    """down (curve(gate x) up x), or down curve(up x) without a gate."""

    def __init__(self, told: plan.Mlp, products: Products, place: Place) -> None:
        super().__init__(place)
        gate, up = products.pair(told.gate, told.up)
        self._one = _One(gate, up, products.one(told.down), told.curve)
        self._share = None if told.share is None else products.one(told.share)

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        out = self._one(x)
        return out if self._share is None else out * torch.sigmoid(self._share(x))

    def native(self) -> dict[str, Any]:
        """As `Part.native`."""
        return self.place.native() | {"kind": "mlp"} | self._one.native() | native_of({"share": self._share})

    def _products(self) -> list[Linear]:
        return [*self._one.products(), *([] if self._share is None else [self._share])]

    @property
    def nbytes(self) -> int:
        """As `Part.nbytes`."""
        return _nbytes(self.place, *self._products())

    def held(self) -> Iterator[Any]:
        """As `Part.held`."""
        yield from _held(self.place, *self._products())


@final
class Experts(Part):
    """Of which each token goes through some, chosen by the router; all are held as they are stored."""

    def __init__(self, told: plan.Experts, products: Products, weights: Weights, place: Place) -> None:
        """weights: by full names."""
        super().__init__(place)
        self._told, self._router = told, products.one(told.router)
        self._favour = None if told.favour is None else weights.vector(told.favour)
        self._before, self._behind = (
            None if product is None else products.one(product) for product in (told.before, told.behind)
        )
        shape = weights.shape(told.wide) or (0, 0)
        cuts = list(torch.arange(shape[1]).chunk(2)) if told.gated else [None]
        wide = [matrices(one, cuts) for one in matrices_of(weights.stored(told.wide))]
        down = [matrix(one) for one in matrices_of(weights.stored(told.down))]
        self._each = [
            _One(Linear(first[0]) if told.gated else None, Linear(first[-1]), Linear(second), told.curve)
            for first, second in zip(wide, down, strict=True)
        ]

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        chosen, weights = route(self._told, self._router(x), self._favour)
        inner = x if self._before is None else self._before(x)
        out = torch.zeros_like(inner)
        for e in chosen.unique().tolist():
            rows, at = torch.where(chosen == e)
            out.index_add_(0, rows, self._each[e](inner[rows]) * weights[rows, at, None])
        return out if self._behind is None else self._behind(out)

    def native(self) -> dict[str, Any]:
        """As `Part.native`."""
        told = self._told
        how: dict[str, Any] = {"kind": "experts", "chosen": told.chosen, "choice": told.choice}
        if told.choice == "sigmoid":
            how |= {"favour": self._favour, "groups": told.groups, "chosen_groups": told.chosen_groups}
            how |= {"normalised": told.normalised, "factor": told.factor}
        outer = {"router": self._router, "before": self._before, "behind": self._behind}
        each = [one.native() for one in self._each]
        return self.place.native() | how | native_of(outer) | {"each": each}

    def _outer(self) -> list[Linear]:
        return [part for part in (self._router, self._before, self._behind) if part is not None]

    @property
    def nbytes(self) -> int:
        """As `Part.nbytes`; of experts as many as a token goes through, of their mean size."""
        each = sum(part.nbytes for one in self._each for part in one.products())
        favour = 0 if self._favour is None else self._favour.nbytes
        return _nbytes(self.place, *self._outer()) + favour + each * self._told.chosen // len(self._each)

    def held(self) -> Iterator[Any]:
        """As `Part.held`."""
        inner = [part for one in self._each for part in one.products()]
        yield from _held(self.place, *self._outer(), *inner)
        yield from (self._favour, self._favour)


@final
class _One:
    """An MLP without its place."""

    def __init__(self, gate: Linear | None, up: Linear, down: Linear, curve: str) -> None:
        self._gate, self._up, self._down, self._curve = gate, up, down, curve

    def __call__(self, x: Tensor) -> Tensor:
        curve = CURVES[self._curve]
        wide = curve(self._up(x)) if self._gate is None else curve(self._gate(x)) * self._up(x)
        return self._down(wide)

    def native(self) -> dict[str, Any]:
        """As the decoder takes it."""
        return {"curve": self._curve} | native_of({"gate": self._gate, "up": self._up, "down": self._down})

    def products(self) -> list[Linear]:
        """All that it has."""
        return [part for part in (self._gate, self._up, self._down) if part is not None]


def route(told: plan.Experts, logits: Tensor, favour: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to, and what their outputs count, as the stock routers say it.

    Args:
        logits: (L, experts). favour: (experts,), added to the scores for the choice alone.

    Returns:
        (L, chosen) each.
    """
    if told.choice == "softmax":  # Jamba
        weights, chosen = logits.softmax(-1).topk(told.chosen)
        return chosen, weights
    if told.choice == "softmax_of_chosen":  # Granite
        found, chosen = logits.topk(told.chosen)
        return chosen, found.softmax(-1)
    assert favour is not None, "NemotronH"
    scores = logits.sigmoid()
    left = (scores + favour).unflatten(-1, (told.groups, -1))
    best = left.topk(min(2, left.shape[-1])).values.sum(-1).topk(told.chosen_groups).indices
    open_ = torch.zeros(left.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    chosen = left.masked_fill(~open_[..., None], -torch.inf).flatten(1).topk(told.chosen).indices
    weights = scores.gather(1, chosen)
    if told.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * told.factor


def _nbytes(place: Place, *products: Linear) -> int:
    norm = 0 if place.norm is None else place.norm.nbytes
    return norm + sum(part.nbytes for part in products)


def _held(place: Place, *products: Linear) -> Iterator[Any]:
    yield from (place.norm, place.norm)
    for part in products:
        yield from part.held()
