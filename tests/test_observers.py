"""observers.py: sums do not depend on how time is cut, and are in the units they claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico import pico_mamba

from sparsessm import calibrate
from sparsessm.architectures import adapt
from sparsessm.calibrate import walk
from sparsessm.methods.sparsessm import time_weights
from sparsessm.observers import StateEnergy, StateError, StateVote
from sparsessm.patterns import NofM, Unstructured

TOKENS = torch.randint(0, 64, (3, 50), generator=torch.Generator().manual_seed(0))


def observe(make: Callable[[torch.Tensor], Any], longest: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(calibrate, "LONGEST", longest)
    stop = next(walk(adapt(pico_mamba()), TOKENS, passes=1))
    target = stop.block.targets[0]
    return stop.seen(target, make(target.matrix))


@pytest.mark.parametrize("longest", [1, 7, 49])
def test_energy_does_not_depend_on_slabs(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(weight: torch.Tensor) -> StateEnergy:
        return StateEnergy(time_weights("power:1", 50))

    whole, cut = observe(make, 50, monkeypatch), observe(make, longest, monkeypatch)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(1, 4)])
def test_votes_do_not_depend_on_slabs(pattern: Unstructured | NofM, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(weight: torch.Tensor) -> StateVote:
        return StateVote(weight, pattern, 0.75)

    whole, cut = observe(make, 50, monkeypatch), observe(make, 7, monkeypatch)
    assert torch.equal(whole, cut)
    assert int(whole.sum()) == 50 * 256 * 3 // 4, "three of four entries get a vote at every step"


def test_error_is_in_units_of_the_residual_stream() -> None:
    """Scaling out_proj by 3 scales every error energy by 9."""
    results = []
    for scale in (1.0, 3.0):
        model = pico_mamba()
        with torch.no_grad():
            model.backbone.layers[0].mixer.out_proj.weight.mul_(scale)
        stop = next(walk(adapt(model), TOKENS, passes=1))
        results.append(stop.seen(stop.block.targets[0], StateError("memoryless", diagonal=False)))
    one, three = results
    for name in ("gram", "cross", "power"):
        torch.testing.assert_close(getattr(three, name), 9 * getattr(one, name))
    assert three.signal == pytest.approx(9 * one.signal, rel=1e-6)


def test_diagonal_is_the_diagonal() -> None:
    stop = next(walk(adapt(pico_mamba()), TOKENS, passes=1))
    full, diagonal = (stop.seen(stop.block.targets[0], StateError("unit", d)) for d in (False, True))
    torch.testing.assert_close(diagonal.gram, full.gram.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=0)
