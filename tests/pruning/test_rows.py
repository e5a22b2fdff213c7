"""Every row of the tables of methods and of allocations, run on a whole model: as much goes as was asked for,
and without repair the rest stays to the bit."""

from __future__ import annotations

import pytest
import torch
from lively import TOKENS, mamba
from planned import prune

from sparsessm.architectures import adapt
from sparsessm.methods import entry_methods
from sparsessm.methods.allocation import ALLOCATIONS
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()
ROWS = [
    (method, family)
    for method, row in METHODS.items()
    if "grid" not in row.defaults  # that round: test_bits.py
    for family in row.families
]


@pytest.mark.parametrize(("method", "family"), ROWS)
def test_without_repair_every_method_only_removes(method: str, family: str) -> None:
    model = mamba(tie_word_embeddings=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = {"repair": "none"} if "repair" in METHODS[method].defaults else {}
    recipe = Recipe(target=family, method=method, sparsity=0.4, **told).resolved(model="m", trained_length=21)
    report = prune(adapt(model), recipe, TOKENS)
    rows = {row.target: row for row in report.rows}
    companions = {name for row in report.rows for name in row.repaired}
    assert rows and {row.family for row in report.rows} == {family}
    for name, tensor in model.state_dict().items():
        if name not in rows:
            assert torch.equal(tensor, before[name]) != (name in companions), name
            continue
        gone = tensor == (38.0 if family == "ssm" else 0.0)
        assert torch.equal(tensor[~gone], before[name][~gone]), name
        assert int(gone.sum()) == rows[name].pruned > 0


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_removes_the_share_asked_for(allocation: str) -> None:
    recipe = Recipe(target="projections", allocation=allocation, sparsity=0.5)
    report = prune(adapt(mamba()), recipe.resolved(model="m", trained_length=21), TOKENS)
    shares = {row.target: row.pruned / row.total for row in report.rows}
    assert sum(row.pruned for row in report.rows) == pytest.approx(
        sum(row.total for row in report.rows) / 2, rel=1e-2
    )
    uneven = max(shares.values()) - min(shares.values()) > 0.02
    assert uneven == (allocation != "uniform"), shares
