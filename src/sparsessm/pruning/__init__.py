"""The loops: a recipe and a model make a plan, and running it leaves a pruned model and its report.

plan.py         what every plan can be asked
naming.py       errors begin with the name of what they are about
entries.py      single entries, block after block: calibrate, score, mask, repair
shares.py       which matrix loses how much
structured.py   whole units: which of the files below does what
units.py        states, channels and heads are cut out and the rest repaired
blocks.py       which blocks go
mixes.py        how much of which axis
widths.py       layers of different widths
projection.py   projected states of Mamba-2
preview.py      what a plan would do, before it is done
forecast.py     how long that takes on this machine
"""

from __future__ import annotations

from sparsessm.architectures import Architecture
from sparsessm.calibration.journal import Forgetful, Journal
from sparsessm.pruning.entries import EntryPlan
from sparsessm.pruning.plan import Plan
from sparsessm.pruning.structured import UnitPlan
from sparsessm.recipe.aims import aimed
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign
from sparsessm.recipe.sizes import order

__all__ = ["Forgetful", "Journal", "Plan", "make_plan"]


def make_plan(recipe: Recipe, architecture: Architecture) -> Plan:
    """What a recipe does to a model.

    Args:
        recipe: resolved. architecture: from `adapt(model)`.

    Raises:
        ValueError: as `recipe.rules.assign` and `recipe.sizes.order`: what does not fit the model.
    """
    if recipe.takes_units:
        return UnitPlan(recipe, order(recipe, architecture))
    recipe = aimed(recipe, architecture)
    return EntryPlan(recipe, assign(recipe, architecture.targets))
