"""Rounding in a run: bits asked for are met, what is stored gives the weights exactly, others stay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lively import TOKENS, mamba
from planned import prune

from sparsessm.architectures import adapt
from sparsessm.pruning.plan import Rows
from sparsessm.recipe.recipe import Recipe
from sparsessm.report.record import Report


def run(model: torch.nn.Module, **fields: object) -> Report:
    recipe = Recipe(**fields).resolved(model="m", trained_length=21)
    return prune(adapt(model), recipe, TOKENS)


@pytest.mark.parametrize(("target", "tied"), [("projections", True), ("matrices", True), ("matrices", False)])
@pytest.mark.parametrize("bits", [2.5, 3.25, 6.0])
def test_bits_are_met(bits: float, target: str, tied: bool) -> None:
    model = mamba(tie_word_embeddings=tied)
    report = run(model, bits=bits, target=target)
    entries = sum(row.total for row in report.rows)
    assert sum(row.bits for row in report.rows) / entries == pytest.approx(bits, rel=0.02)
    assert "sparsity" not in report.recipe
    families = {"projections"} | ({"head"} if target == "matrices" else set())
    families |= set() if tied else {"embedding"}
    assert {row.family for row in report.rows} == families
    steps = [row.step for row in report.rows]
    assert all(steps) and max(steps) < 1.6 * min(steps), "one step, up to what was foretold wrongly"


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3.25},
        {"grid": "int4"},
        {"grid": "int3:16", "sparsity": 0.5},
        {"grid": "int4:8", "pattern": "2:4", "ignore": ("dt_proj",)},
        {"bits": 5, "pattern": "2:4", "ignore": ("dt_proj",)},
        {"method": "rtn", "grid": "int8"},
        {"method": "gptq", "repair": "dense-target"},
        {"method": "wanda", "grid": "int4", "sparsity": 0.25},
        {"method": "magnitude", "grid": "int5", "sparsity": 0.25, "target": "projections"},
    ],
)
def test_what_is_stored_is_the_model(fields: dict[str, object]) -> None:
    model = mamba()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = run(model, **fields)
    assert report.levels.keys() == {row.target for row in report.rows}
    for row in report.rows:
        coded, weight = report.levels[row.target], model.state_dict()[row.target]
        levels = coded.levels()
        assert torch.equal(levels.values(), weight.flatten(1)) and weight.dtype == torch.float32
        assert row.bits == coded.bits and row.pruned == int((~levels.keep).sum())
        share = {"sparsity": fields.get("sparsity"), "pattern": 0.5}
        if fields.get("pattern"):
            groups = (weight.flatten(1) != 0).unflatten(1, (-1, 4)).sum(-1)
            assert (groups <= 2).all()
        elif "sparsity" in fields:
            assert row.pruned >= 0.2 * share["sparsity"] * row.total
        elif "grid" in fields:
            assert row.pruned == 0
    for name, tensor in model.named_parameters():  # a tied one is there once
        assert torch.equal(tensor, before[name]) == (name not in report.levels), name


def test_an_embedding_of_its_own_is_rounded_where_tokens_are() -> None:
    """Rows that the text has are nearer than others, in every way of rounding that knows of them."""
    model = mamba(tie_word_embeddings=False)
    table = model.backbone.embeddings.weight
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    before = table.detach().clone()
    report = run(model, bits=3, target="matrices")
    (row,) = (row for row in report.rows if row.family == "embedding")
    assert (row.repair, row.price, row.target) == ("self", "fisher", "backbone.embeddings.weight")
    error = (table - before).square().mean(1)
    said = TOKENS.flatten().bincount(minlength=len(table))
    often, never = said >= said.float().quantile(0.75), said == said.min()
    assert error[often].mean() < 0.8 * error[never].mean()
    for more in ({"method": "rtn", "grid": "int4"}, {"grid": "int4", "price": "none"}, {"sparsity": 0.5}):
        model = mamba(tie_word_embeddings=False)
        before = model.backbone.embeddings.weight.detach().clone()
        run(model, target="embedding", **more)
        error = (model.backbone.embeddings.weight - before).square().mean() / before.square().mean()
        assert 0 < error < (0.4 if "sparsity" in more else 0.02)


def test_more_bits_are_nearer() -> None:
    for rows in [{"grid": f"int{bits}"} for bits in (2, 4, 8)], [{"bits": bits} for bits in (2.5, 4, 8)]:
        reports = [run(mamba(), target="projections", **fields) for fields in rows]
        errors = [report.totals["projections"]["error"] for report in reports]
        assert errors[0] > 1.25 * errors[1] > 4 * errors[2]


def test_zeros_stay_zeros() -> None:
    for fields in ({"bits": 4.0}, {"grid": "int4"}):
        model = mamba()
        weight = model.backbone.layers[0].mixer.in_proj.weight
        with torch.no_grad():
            weight[::2, ::3] = 0
        gone = weight == 0
        run(model, **fields)
        assert not weight[gone].any() and weight[~gone].any()


def test_rows_that_were_noted_come_back_with_what_is_stored() -> None:
    """In the form in which a journal keeps them."""
    report = run(mamba(), bits=3.25)
    noting = Rows(SimpleNamespace(left={}))
    for row in report.rows:
        noting.add(row, report.levels[row.target])
    noted = noting.new()
    assert noting.new() == []
    again = Rows(SimpleNamespace(left={0: noted[:3], 1: noted[3:], 2: None}))
    assert again.all == report.rows and again.new() == []
    for name, coded in report.levels.items():
        assert torch.equal(again.levels[name].levels().values(), coded.levels().values())
        assert again.levels[name].bits == coded.bits
