"""Matrices of a block that read the same inputs are looked at in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hybrids import hybrid
from pico_hybrids import FAMILIES, NEW, VARIANTS
from planned import prune

from sparsessm.architectures import Target
from sparsessm.architectures.experts import abreast
from sparsessm.calibration import visit
from sparsessm.calibration.walk import Stop, walk
from sparsessm.recipe.recipe import Recipe

pytestmark = pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
TOKENS = torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(0))
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "paired": {},
    "plain": {"method": "sparsegpt"},
    # of those that read the same one is not watched, one is watched otherwise, one is in no rule
    "mixed": {
        "rules": [
            {"targets": ["re:.*k_proj.*"], "method": "magnitude"},
            {"targets": ["re:.*v_proj.*", "re:.*up_proj.*"], "method": "wanda"},
            {"targets": ["projections"], "ignore": ["re:.*gate_proj.*"]},
        ]
    },
    "two of a kind": {
        "rules": [
            {"targets": ["re:.*q_proj.*"], "method": "sparsegpt"},
            {"targets": ["projections"]},
        ]
    },
}
CASES = [("qwen3_5_text", recipe) for recipe in RECIPES]
CASES += [(name, "paired") for name in ("bamba", "jamba", "olmo_hybrid", "kimi_linear-latent", "falcon_h1")]
CASES += [("kimi_linear", "mixed"), ("olmo_hybrid", "two of a kind")]


class Heard:
    """The inputs of one target."""

    options: Mapping[str, Any] = {}
    paired = routed = False

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        self.seen.append(x.clone())


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_what_is_said_to_read_the_same_does(name: str) -> None:
    """And what reads something else is not said to."""
    architecture = hybrid(name)
    for stop in walk(architecture, TOKENS):
        plain = [target for target in stop.block.targets if target.plain and target.family == "projections"]
        heard = {target.kind: Heard() for target in plain}
        stop.run(heard)
        for one in plain:
            for other in plain:
                both = [torch.cat(heard[target.kind].seen, 1) for target in (one, other)]
                alike = both[0].shape == both[1].shape and torch.equal(*both)
                said = one is other or bool(one.reads) and one.reads == other.reads
                # a layer's router and shared expert read what its MLP does, in modules of their own
                assert said == alike or alike and one.name.split(".")[4] != other.name.split(".")[4], (
                    one,
                    other,
                )


def one_by_one(targets: Sequence[Target], watch: Any) -> Iterator[list[Target]]:
    """A pass for each matrix, in the same order."""
    parts: dict[str, list[Target]] = {}
    for part in abreast(targets):
        parts.setdefault(part[0].reads or part[0].name, []).extend(part)
    return ([target] for part in parts.values() for target in part)


def pruned(name: str, recipe: str) -> tuple[Any, dict[str, torch.Tensor], list[tuple[int, int]]]:
    """Rows of the report, all weights, and the steps of the progress bar."""
    architecture, steps = hybrid(name), list[tuple[int, int]]()
    asked = Recipe(**RECIPES[recipe]).resolved(model="m", trained_length=24)
    report = prune(architecture, asked, TOKENS, lambda what, done, of, _: steps.append((done, of)))
    return report.rows, architecture.model.state_dict(), steps


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_one_pass_for_what_reads_the_same_changes_nothing(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one pass for each matrix, bit by bit. (With --bits they share a step too, as experts do.)"""
    passes, run = [0], Stop.run

    def counted(stop: Stop, *args: Any, **how: Any) -> None:
        passes[-1] += 1
        run(stop, *args, **how)

    monkeypatch.setattr(Stop, "run", counted)
    rows, weights, steps = pruned(name, recipe)
    assert steps[-1][0] == steps[-1][1]
    passes.append(0)
    monkeypatch.setattr(visit, "together", one_by_one)
    other_rows, other_weights, _ = pruned(name, recipe)
    assert passes[0] < passes[1] and other_rows == rows
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
