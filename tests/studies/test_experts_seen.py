"""`analyze` and `samples: auto` on experts, and on matrices that blocks share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hybrids import MORE_TOKENS, hybrid, one_sided
from stock import TOKENS, stock_logits
from torch.nn import functional as F

from sparsessm.architectures import adapt
from sparsessm.methods import Rule
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign
from sparsessm.studies import cells, findings, windows
from sparsessm.studies.tolerance import Analysis


def rules_of(architecture: Any) -> dict[str, Rule]:
    fields = {"target": "projections", "method": "sparsegpt", "repair": "self"}
    recipe = Recipe(**fields).resolved(model="m", trained_length=37)
    return dict(assign(recipe, architecture.targets).rules)


@pytest.mark.parametrize("name", ["one-sided", "zamba2"])
def test_cells_are_what_the_stock_model_says_with_the_same_weights(name: str) -> None:
    """KL by transformers, of a model in which the experts of a layer, or all uses of a matrix, are pruned."""
    architecture = one_sided("jamba") if name == "one-sided" else hybrid(name)
    dense: Any = copy.deepcopy(architecture.model)
    rules = rules_of(architecture)
    parts = cells.parts_of(architecture, rules)
    whole = [key for key, part in parts.items() if part[0].routed or part[0].uses][:2]
    some = {target.name: rules[target.name] for key in whole for target in parts[key]}
    kept: dict[tuple[str, float], Any] = {}
    pruned = cells._pruned

    def watched(block: Any, key: str, part: Any, *rest: Any) -> Any:
        variant, cell = pruned(block, key, part, *rest)
        kept[key, cell.sparsity] = {t.name: variant.target(t.kind).matrix.clone() for t in part}
        return variant, cell

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_pruned", watched)
        found = [
            cell for one in cells.measure(architecture, some, [0.3, 0.6], MORE_TOKENS, TOKENS) for cell in one
        ]
    assert [(cell.target, cell.sparsity) for cell in found] == [(key, s) for key in whole for s in (0.3, 0.6)]
    expected = F.log_softmax(stock_logits(dense, TOKENS).double(), -1)
    for cell in found:
        changed = copy.deepcopy(dense)
        targets = {target.name: target for target in adapt(changed).targets}
        for key, matrix in kept[cell.target, cell.sparsity].items():
            targets[key].replace(matrix)
        other = F.log_softmax(stock_logits(changed, TOKENS).double(), -1)
        kl = float((expected.exp() * (expected - other)).sum(-1).mean())
        assert cell.kl == pytest.approx(kl, rel=1e-3, abs=1e-8) and kl > 0
        part = parts[cell.target]
        assert cell.entries == sum(target.matrix.numel() for target in part)
        assert cell.pruned == pytest.approx(cell.sparsity * cell.entries, rel=0.05)
        assert (cell.tokens is None) == (name == "zamba2")
    if name == "one-sided":
        assert found[0].kind == "experts.gate_up_proj" and found[0].inputs == 16
        none = [e for e, count in enumerate(found[0].tokens or ()) if not count]
        assert len(none) == 2 and len(found[0].tokens or ()) == 4
        told = findings.summary(Analysis({"sparsities": [0.3, 0.6]}, len(found), found))
        assert told["experts"][found[0].target]["tokens"] == list(found[0].tokens or ())
        (title, _, rows, _) = findings.summary_tables(told)[-1]
        assert title == "Calibration tokens of experts" and rows[0][1] == ", ".join(f"{e} (0)" for e in none)


def test_the_model_stays_and_every_matrix_has_a_cell() -> None:
    architecture = one_sided("jamba")
    before = {key: tensor.clone() for key, tensor in architecture.model.state_dict().items()}
    rules = rules_of(architecture)
    found = list(cells.measure(architecture, rules, [0.5], MORE_TOKENS, TOKENS))
    assert [one[0].target for one in found] == list(cells.parts_of(architecture, rules))
    assert all(torch.equal(tensor, before[key]) for key, tensor in architecture.model.state_dict().items())


def test_samples_auto_counts_the_tokens_of_experts() -> None:
    architecture = one_sided("jamba")
    recipe = Recipe(target="projections", samples="auto").resolved(model="m", trained_length=37)
    chosen = assign(recipe, architecture.targets)
    tokens = torch.randint(0, 64, (20, 37), generator=torch.Generator().manual_seed(5))
    curve = list(windows.steps(architecture, chosen, tokens))
    assert [(step.experts, step.starved) for step in curve] == [(8, 4)] * len(curve)  # two layers of four
    columns, rows = windows.advice_table([vars(step) for step in curve], curve[0].windows)
    assert columns[-1] == "experts with fewer tokens than inputs" and {row[-1] for row in rows} == {"4 of 8"}
    plain = hybrid("bamba")
    chosen = assign(recipe, plain.targets)
    step = next(windows.steps(plain, chosen, tokens))
    assert (step.experts, step.starved) == (0, 0)
    assert len(windows.advice_table([vars(step)], 4)[0]) == 4
