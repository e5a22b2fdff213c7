"""The plan for whole units: what entries.py is for single entries. Which of the files beside it does what."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.journal import Journal
from sparsessm.calibration.prices import row_prices
from sparsessm.calibration.progress import Progress
from sparsessm.pruning import mixes, preview, projection, units, widths
from sparsessm.pruning.plan import Outcome, Plan, Preview
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import Assignment
from sparsessm.recipe.sizes import Order


class UnitPlan(Plan):
    """Whole units are taken out of the model.

    Attributes:
        order: how many of which axis stay, chosen how.
    """

    def __init__(self, recipe: Recipe, order: Order) -> None:
        super().__init__(recipe)
        self.order = order

    @property
    def methods(self) -> list[str]:
        return self.order.names

    @property
    def asks(self) -> str:
        return f"pattern {self.recipe.pattern!r}" if self.order.looks else ""

    @property
    def assignment(self) -> Assignment:
        return Assignment((), {})

    def preview(self, architecture: Architecture) -> Preview:
        record = preview.units(self.order, architecture)
        return Preview(record, [preview.units_table(str(self.recipe.model), record)])

    def share_left(self, architecture: Architecture) -> float:
        if self.order.share is not None:
            return 1.0 - self.order.share
        counts = preview.units(self.order, architecture)["parameters"]
        return 1.0 if counts["after"] is None else counts["after"] / counts["now"]

    def working(self, architecture: Architecture) -> int:
        return round(self.share_left(architecture) * preview.working(architecture, {}))

    def _carry_out(
        self, architecture: Architecture, tokens: Tensor | None, progress: Progress | None, journal: Journal
    ) -> Outcome:
        order, dense = self.order, _parameters(architecture)
        trials: list[dict[str, Any]] = []
        if order.share is not None:
            assert tokens is not None
            order, trials = mixes.find(architecture, order, tokens, progress, journal)
        if any(method.projects for method in order.methods.values()):
            assert tokens is not None
            rows = projection.project(architecture, order, tokens, progress, journal)
        else:
            prices = own = None
            if order.by_layer:
                assert tokens is not None
                prices = row_prices(architecture, tokens, progress, journal) if order.priced else {}
                own = widths.find(architecture, order, tokens, prices, progress, journal)
            rows = units.shrink(architecture, order, tokens, progress, prices, widths=own, journal=journal)
        parameters = {"dense": dense, "pruned": _parameters(architecture)}
        return Outcome(rows, parameters, dict(order.sizes), trials)


def _parameters(architecture: Architecture) -> int:
    return sum(parameter.numel() for parameter in architecture.model.parameters())
