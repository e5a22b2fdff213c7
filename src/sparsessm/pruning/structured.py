"""A run with a structured pattern, from recipe to report: what `pipeline.prune` is for single entries."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.walk import Progress
from sparsessm.data.edition import edition
from sparsessm.data.texts import fingerprint
from sparsessm.pruning import mixes, projection, units, widths
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.units import order
from sparsessm.report.record import Report


def run(
    architecture: Architecture, recipe: Recipe, tokens: Tensor | None, progress: Progress | None = None
) -> Report:
    """Take whole units out of the model in place.

    Args:
        recipe: resolved, with a structured pattern. tokens: (W, L) int64 calibration windows, None where
            nothing is looked at.

    Raises:
        ValueError: as `units.order`, `mixture.find` and `structure.shrink`.
    """
    began = time.perf_counter()
    wanted = order(recipe, architecture)
    if wanted.looks and tokens is None:
        raise ValueError(f"pattern {recipe.pattern!r} needs calibration windows, none were given")
    dense = _parameters(architecture)
    trials: list[dict[str, Any]] = []
    if wanted.share is not None:
        assert tokens is not None
        wanted, trials = mixes.find(architecture, wanted, tokens, progress)
    if any(selection.projects for selection in wanted.selections.values()):
        assert tokens is not None
        rows = projection.project(architecture, wanted, tokens, progress)
    else:
        costs = own = None
        if wanted.by_layer:
            assert tokens is not None
            costs = units.row_costs(architecture, tokens, progress) if wanted.fisher else {}
            own = widths.find(architecture, wanted, tokens, costs, progress)
        rows = units.shrink(architecture, wanted, tokens, progress, costs, widths=own)
    sha256 = fingerprint(tokens) if tokens is not None and wanted.looks else ""
    report = Report(recipe.model_dump(), rows, sha256, time.perf_counter() - began)
    report.parameters = {"dense": dense, "pruned": _parameters(architecture)}
    report.shape, report.trials = dict(wanted.sizes), trials
    report.text = edition(recipe.data, "calibration") if sha256 else {}
    return report


def _parameters(architecture: Architecture) -> int:
    return sum(parameter.numel() for parameter in architecture.model.parameters())
