"""A recipe carried out on a model, without the door: what many tests prune by."""

from __future__ import annotations

from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.progress import Progress
from sparsessm.pruning import make_plan
from sparsessm.recipe.recipe import Recipe
from sparsessm.report.record import Report


def prune(
    architecture: Architecture, recipe: Recipe, tokens: Tensor | None, progress: Progress | None = None
) -> Report:
    """Plan and run."""
    return make_plan(recipe, architecture).run(architecture, tokens, progress)
