"""`samples: auto` where an entry of A_log is a whole head of several channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import pico_mamba, pico_mamba2
from pico_hybrids import pico_hybrid
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.calibration.visit import survey
from sparsessm.methods.observers import StateError
from sparsessm.methods.repair import error_of, refit_skip
from sparsessm.pruning.entries import solve
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign
from sparsessm.studies.windows import steps

TOKENS = torch.randint(0, 64, (9, 24), generator=torch.Generator().manual_seed(0))  # 3 are held out


@pytest.mark.parametrize("make", [pico_mamba, pico_mamba2, lambda: pico_hybrid("bamba")])
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
def test_the_held_out_error_is_that_of_the_mask_chosen_on_the_first_windows(make: Any, removed: str) -> None:
    architecture = adapt(make())
    recipe = Recipe(sparsity=0.5, target="ssm", price="none", allocation="uniform", removed=removed)
    assignment = assign(recipe.resolved(model="m", trained_length=24), architecture.targets)
    rules = assignment.rules

    def seen(windows: Tensor) -> dict[str, Any]:
        return {
            target.name: sums
            for target, sums in survey(
                architecture,
                windows,
                lambda t: StateError(removed, False, None, len(t.matrix)) if t.name in rules else None,
            )
        }

    first, held = seen(TOKENS[:4]), seen(TOKENS[6:])
    errors, entries = 0.0, 0
    for target in architecture.targets:
        if target.name in rules:
            keep = solve(target, rules[target.name], first[target.name]).keep
            error = error_of(held[target.name], keep, refit_skip(first[target.name], keep))
            errors += keep.numel() * error / held[target.name].signal
            entries += keep.numel()
    (point,) = steps(architecture, assignment, TOKENS)
    assert 0 < point.error == pytest.approx(errors / entries, rel=1e-3)
