"""Experts of one layer take turns: one pass looks at all their matrices of one kind. And every method on
every hybrid."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from forward import logits_of
from hybrids import MIXTURES, MORE_TOKENS, hybrid, one_sided
from pico_hybrids import FAMILIES, VARIANTS, pico_hybrid
from planned import prune
from stock import assert_same, stock_logits
from torch import Tensor
from transformers import PreTrainedModel

from sparsessm.architectures import Target, adapt
from sparsessm.architectures.experts import abreast
from sparsessm.architectures.hybrid import Hybrid
from sparsessm.calibration import slabs, visit
from sparsessm.calibration.visit import HELD, together
from sparsessm.calibration.walk import Stop
from sparsessm.methods import entry_methods
from sparsessm.methods.observers import InputGram, InputNorm
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()

FEW_TOKENS = MORE_TOKENS[:2, :16]
EXPERTS = r"re:.*experts\..*_proj\."  # and a number

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "paired": {},
    "plain": {"target": "projections", "method": "sparsegpt"},
    "norms": {"target": "projections", "method": "wanda"},
    # Not all experts of a kind are watched, and not all in both models; so the last one, too.
    "mixed": {
        "rules": [
            {"targets": [f"{EXPERTS}0"], "method": "magnitude"},
            {"targets": [f"{EXPERTS}3"], "method": "sparsegpt"},
            {"targets": ["projections"]},
        ]
    },
    "last-alone-unwatched": {
        "rules": [{"targets": [f"{EXPERTS}3"], "method": "magnitude"}, {"targets": ["projections"]}]
    },
}

# Every recipe where experts see all tokens and where some see none; of other families every way to ask for
# experts once more: by default, by one kind of sums, and not all of them.
ABREAST = [(name, recipe) for name in ("jamba", "one-sided") for recipe in RECIPES]
ABREAST += [(name, "paired") for name in ("nemotron_h", "granitemoehybrid", "nemotron_h-latent")]
ABREAST += [("nemotron_h", "plain"), ("nemotron_h-latent", "mixed"), ("granitemoehybrid", "norms")]
ABREAST += [("granitemoehybrid", "last-alone-unwatched")]
assert {name for name, _ in ABREAST} == {*MIXTURES, "nemotron_h-latent", "one-sided"}


class Watcher:
    """Passes through the blocks, as (layer, until), and steps of the progress bar."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[tuple[int, str | None]] = []
        self.steps: list[tuple[int, int]] = []
        run = Stop.run

        def watched(stop: Stop, taps: Any, *, until: str | None = None, **how: Any) -> None:
            self.passes.append((stop.block.index, until))
            run(stop, taps, until=until, **how)

        monkeypatch.setattr(Stop, "run", watched)

    def __call__(self, stage: str, done: int, total: int, block: str) -> None:
        if stage == "calibrate" and done and (done, total) not in self.steps[-1:]:  # not where the work is
            self.steps.append((done, total))

    def of_experts(self) -> dict[int, list[str]]:
        """Layer -> how far each pass went that looked at experts."""
        found: dict[int, list[str]] = {}
        for layer, until in self.passes:
            if until is not None and until.startswith("experts."):
                found.setdefault(layer, []).append(until)
        return found

    def assert_bar_ended(self) -> None:
        assert self.steps == [(done, len(self.steps)) for done in range(1, len(self.steps) + 1)]


def run(
    architecture: Hybrid, recipe: Mapping[str, Any], tokens: Tensor = MORE_TOKENS, told: Any = None
) -> tuple[list[Any], dict[str, Tensor]]:
    """Rows of the report and all weights."""
    asked = Recipe(**recipe).resolved(model="m", trained_length=37)
    report = prune(architecture, asked, tokens, told)
    return report.rows, architecture.model.state_dict()


def one_by_one(targets: Sequence[Target], watch: Any) -> Iterator[list[Target]]:
    """A pass for each matrix, in the same order."""
    return ([target] for part in abreast(targets) for target in part)


# --- experts abreast ---


@pytest.mark.parametrize(("name", "recipe"), ABREAST)
def test_one_pass_for_all_experts_changes_nothing(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one pass for each matrix, bit by bit, in slabs of time; with experts without tokens as well."""
    monkeypatch.setattr(slabs, "LONGEST", 16)
    architectures = [one_sided("jamba") if name == "one-sided" else hybrid(name) for _ in range(3)]
    rows, weights = run(architectures[0], RECIPES[recipe])
    with monkeypatch.context() as narrow:
        narrow.setattr(visit, "HELD", 8192)
        results = [run(architectures[1], RECIPES[recipe])]
    monkeypatch.setattr(visit, "together", one_by_one)
    results.append(run(architectures[2], RECIPES[recipe]))
    assert any(row.tokens for row in rows)
    assert any(row.tokens == 0 for row in rows) == (name == "one-sided")
    for other_rows, other_weights in results:
        assert other_rows == rows
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights)


@pytest.mark.parametrize("recipe", ["paired", "plain", "norms"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_a_layer_take_two_passes(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher(monkeypatch)
    architecture = hybrid(name)
    run(architecture, RECIPES[recipe], told=watcher)
    first = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    layers = {target.layer for target in architecture.targets if target.routed}
    assert watcher.of_experts() == {
        layer: [f"experts.{first}.3", "experts.down_proj.3"] for layer in sorted(layers)
    }
    watcher.assert_bar_ended()


def test_no_more_hessians_than_fit_are_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of paired Hessians of 16 inputs two fit, of 24 inputs none; mean squares take next to nothing."""
    monkeypatch.setattr(visit, "HELD", 2 * (2 * 8 * 16**2))
    watcher = Watcher(monkeypatch)
    run(hybrid("jamba"), RECIPES["paired"], told=watcher)
    # what experts borrow for their second matrices is of all of them: every pass goes to the last
    narrow = [f"experts.gate_up_proj.{e}" for e in (1, 3)] + ["experts.down_proj.3"] * 4
    assert watcher.of_experts() == {1: narrow, 3: narrow}
    watcher.assert_bar_ended()
    assert HELD == 2**31
    experts = [target for target in hybrid("jamba").blocks[1].targets if target.routed]
    for watch, parts in (
        (lambda target: InputGram(paired=True), 6),
        (lambda target: InputGram(), 5),  # 4 of 16 inputs; one of 24
        (lambda target: InputNorm(), 2),
        (lambda target: None, 2),
    ):
        assert len(list(together(experts, watch))) == parts


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_only_experts_go_abreast(name: str) -> None:
    for block in hybrid(name).blocks:
        parts = abreast(block.targets)
        kinds = [target.kind for target in block.targets]
        assert sorted(target.kind for part in parts for target in part) == sorted(kinds)
        plain = [kind for kind in kinds if not kind.startswith("experts.")]
        assert [part[0].kind for part in parts if not part[0].routed] == plain
        for first, second in zip(parts, parts[1:], strict=False):
            if first[0].routed and second[0].routed:
                stems = [{target.kind.rpartition(".")[0] for target in part} for part in (first, second)]
                assert len(stems[0]) == 1 and stems[1] == {"experts.down_proj"}
                assert [int(target.kind.rpartition(".")[2]) for target in first] == [0, 1, 2, 3]


@pytest.mark.parametrize("target", ["ssm", "projections", "all"])
@pytest.mark.parametrize("name", [*FAMILIES, "zamba2-two-blocks"])
def test_the_bar_ends_at_its_total(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "LONGEST", 16)
    watcher = Watcher(monkeypatch)
    run(hybrid(name), {"target": target}, told=watcher)
    watcher.assert_bar_ended()


# --- every method on every hybrid ---


@cache
def dense(name: str) -> tuple[PreTrainedModel, Tensor]:
    model = pico_hybrid(name)
    return model, stock_logits(model, FEW_TOKENS)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "grid" not in row.defaults])
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_every_method_prunes_every_hybrid(name: str, method: str) -> None:
    model, before = dense(name)
    architecture = adapt(copy.deepcopy(model))
    assert isinstance(architecture, Hybrid)
    family = "ssm" if "projections" not in METHODS[method].families else "all"
    rows, _ = run(architecture, {"target": family, "method": method}, FEW_TOKENS)
    targets = {target.name: target for target in architecture.targets}
    families = {"ssm"} if family == "ssm" else {"ssm", "projections"}
    assert {row.target for row in rows} == {name for name, t in targets.items() if t.family in families}
    for row in rows:
        gone = 38.0 if row.family == "ssm" else 0.0
        assert row.pruned == int((targets[row.target].matrix == gone).sum())
    for part in families:
        of = [row for row in rows if row.family == part]
        assert sum(row.pruned for row in of) / sum(row.total for row in of) == pytest.approx(0.5, abs=0.02)
    ours = logits_of(architecture, FEW_TOKENS)
    assert torch.isfinite(ours).all()
    assert_same(ours, stock_logits(architecture.model, FEW_TOKENS))
    assert (ours - before).abs().max() > 1e-4 * before.abs().max()


# --- experts that torch's grouped product refuses ---

ODD: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "jamba, inner": ("jamba", {"intermediate_size": 37}),
    "jamba, stream": ("jamba", {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "nemotron_h, inner": ("nemotron_h", {"moe_intermediate_size": 13}),
    "nemotron_h, latent": ("nemotron_h-latent", {"moe_latent_size": 7, "moe_intermediate_size": 9}),
    "granitemoehybrid, inner": ("granitemoehybrid", {"intermediate_size": 21}),
    "granitemoehybrid, one": ("granitemoehybrid", {"intermediate_size": 1}),
}


@pytest.mark.parametrize("case", ODD)
def test_experts_of_odd_sizes_have_the_stock_logits(case: str) -> None:
    name, sizes = ODD[case]
    want = stock_logits(pico_hybrid(name, **sizes, experts_implementation="eager"), FEW_TOKENS)
    assert_same(logits_of(hybrid(name, **sizes), FEW_TOKENS), want)


def test_experts_of_odd_sizes_are_pruned() -> None:
    """Rows that are no multiple of 16 bytes: as with eager experts."""
    name, sizes = ODD["jamba, inner"]
    found = []
    for how in ({}, {"experts_implementation": "eager"}):
        rows, weights = run(hybrid(name, **sizes, **how), RECIPES["norms"], FEW_TOKENS)
        assert any("experts" in row.target and row.pruned for row in rows)
        found.append(weights)
    assert all(torch.equal(tensor, found[1][which]) for which, tensor in found[0].items())
