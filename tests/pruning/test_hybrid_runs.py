"""Whole runs on the hybrids, into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import planned
import pytest
import torch
from forward import logits_of
from hybrids import MIXTURES, MORE_TOKENS, hybrid, one_sided
from pico import pico_tokenizer
from pico_hybrids import COMMON, FAMILIES, pico_hybrid
from stock import TOKENS, assert_same, stock_logits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from sparsessm import checkpoint
from sparsessm.architectures import MODEL_TYPES, adapt
from sparsessm.architectures.hybrid_block import HybridBlock
from sparsessm.calibration import prices
from sparsessm.recipe.recipe import Recipe

WHOLE: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "magnitude": {"method": "magnitude"},
    "wanda": {"target": "projections", "method": "wanda"},
    "sparsegpt": {"target": "projections", "method": "sparsegpt", "pattern": "2:4"},
    "ssm-fisher": {"target": "ssm", "price": "fisher"},
}


def prune(architecture: Any, recipe: str, **more: Any) -> Any:
    asked = Recipe(**WHOLE[recipe] | more).resolved(model="m", trained_length=37)
    return planned.prune(architecture, asked, MORE_TOKENS)


@pytest.mark.parametrize("recipe", WHOLE)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_run(name: str, recipe: str) -> None:
    """The pruned model is what stock code computes, and as sparse as was asked for."""
    # 2:4 wants rows of dt_proj that four divides
    architecture = hybrid(name, **({"mamba_dt_rank": 4} if name == "jamba" else {}))
    dense = logits_of(architecture, TOKENS)
    report = prune(architecture, recipe)
    wanted = {"ssm", "projections"} if recipe in ("default", "magnitude") else {
        "projections" if "projections" in WHOLE[recipe].values() else "ssm"
    }  # fmt: skip
    assert {row.family for row in report.rows} == wanted
    targets = {target.name: target for target in architecture.targets if target.family in wanted}
    assert {row.target for row in report.rows} == targets.keys()
    share = sum(row.pruned for row in report.rows) / sum(row.total for row in report.rows)
    assert share == pytest.approx(0.5, abs=0.01)
    for row in report.rows:
        gone = 0.0 if row.family == "projections" else 38.0
        assert row.pruned == int((targets[row.target].matrix == gone).sum())
    ours = logits_of(architecture, TOKENS)
    assert_same(ours, stock_logits(architecture.model))
    assert (ours - dense).abs().max() > 1e-4 * dense.abs().max()


@pytest.mark.parametrize("name", [*MIXTURES, "zamba2"])
def test_experts_and_all_uses_have_a_price(name: str) -> None:
    """Mean squared gradient of the loss at each output, by autograd through the stock model."""
    architecture = hybrid(name)
    got = prices.output_fisher(architecture, TOKENS)
    model: Any = architecture.model
    want: dict[str, Tensor] = {}
    owners = {t.parameter.data_ptr(): t.name for t in architecture.targets if t.module_class == "Linear"}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.data_ptr() in owners:

            def keep(module: Any, args: Any, out: Tensor) -> None:
                name = owners[module.weight.data_ptr()]

                def add(grad: Tensor) -> None:
                    want[name] = want.get(name, torch.zeros(())) + grad.flatten(0, -2).double().square().sum(
                        0
                    )

                out.register_hook(add)

            module.register_forward_hook(keep)
    logits = model(TOKENS, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    for target in architecture.targets:
        if target.module_class == "Linear" and target.family == "projections" and target.kind != "dt_proj":
            assert_same(got[target.name], want[target.name] / TOKENS.numel(), 1e-4)
    for target in architecture.targets:
        if target.kind.startswith("experts."):
            assert got[target.name].shape == (target.matrix.shape[0],) and (got[target.name] > 0).any()


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt", "default"])
@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_that_saw_no_token_borrows_all(name: str, recipe: str) -> None:
    """It is pruned like the others, with what its layer says, and the report names it."""
    architecture = one_sided(name)
    targets = {target.name: target.matrix.shape[1] for target in architecture.targets}
    report = prune(architecture, recipe, **({"ignore": "dt_proj"} if name == "jamba" else {}))
    experts = [row for row in report.rows if "experts." in row.target and row.target[-1].isdigit()]
    none = [row for row in experts if row.tokens == 0]
    assert none and all(row.borrowed == 1.0 for row in none)
    assert all(row.method != "magnitude" and row.borrowed is not None for row in experts)
    assert {row.repair for row in none} == {row.repair for row in experts}
    few = [row for row in experts if row.tokens is not None and row.tokens < targets[row.target]]
    assert f"{len(few)} of {len(experts)} expert matrices saw fewer calibration tokens" in report.damped()
    assert few[0].target in report.damped()
    assert {(row.tokens, row.borrowed) for row in report.rows if row not in experts} == {(None, None)}
    assert_same(logits_of(architecture, TOKENS), stock_logits(architecture.model))


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_through_a_checkpoint(name: str, tmp_path: Path) -> None:
    """The result is a stock model: stock code computes from its files what was measured here."""
    model = pico_hybrid(name)
    made = checkpoint.Checkpoint(model, pico_tokenizer(), "memory", "transformers", {}, None)
    architecture = adapt(model)
    prune(architecture, "magnitude")
    ours = logits_of(architecture, TOKENS)
    checkpoint.save(made, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(stock_logits(stock), ours)
    came = checkpoint.load(tmp_path / "out")
    assert_same(logits_of(adapt(came.model, came.stored), TOKENS), ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_that_stock_code_wrote(name: str, tmp_path: Path) -> None:
    model = pico_hybrid(name)
    model.save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    came = checkpoint.load(tmp_path / "in")
    architecture = adapt(came.model, came.stored)
    assert_same(logits_of(architecture, TOKENS), stock_logits(model))
    prune(architecture, "magnitude")
    checkpoint.save(came, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(stock_logits(stock), logits_of(architecture, TOKENS))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (name, f"structured:{axis}")
        for name in FAMILIES
        for axis in MODEL_TYPES[name].structure
        if axis != "head"
    ],
)
def test_a_run_that_takes_units_out(name: str, pattern: str, tmp_path: Path) -> None:
    model = pico_hybrid(name)
    made = checkpoint.Checkpoint(model, pico_tokenizer(), "memory", "transformers", {}, None)
    architecture = adapt(model)
    share = 1 / len(architecture.blocks) if pattern == "structured:block" else 0.5
    asked = Recipe(pattern=pattern, sparsity=share).resolved(model="m", trained_length=37)
    report = planned.prune(architecture, asked, MORE_TOKENS)
    assert report.parameters["pruned"] < 0.98 * report.parameters["dense"]
    ours = logits_of(architecture, TOKENS)
    assert_same(ours, stock_logits(model))
    checkpoint.save(made, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(stock_logits(stock), ours)


@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "granitemoehybrid"])
def test_the_last_layer_of_a_kind_stays(name: str) -> None:
    """Stock caches fail without a layer of attention, and there would be no mixer to shrink."""
    architecture = hybrid(name)
    blocks = [block for block in architecture.blocks if isinstance(block, HybridBlock)]
    gone: list[int] = []
    while open_ := architecture.may_go(gone):
        gone.append(open_[0])
    left = [block for block in blocks if block.index not in gone]
    assert 1 <= len(left) <= 2 and any(b.attends for b in left) and any(b.mixer for b in left)
    share = (len(gone) + 1) / len(blocks)
    if len(gone) + 1 < len(blocks):
        asked = Recipe(pattern="structured:block", sparsity=share, method="random")
        with pytest.raises(ValueError, match=f"at most {len(gone)} blocks can be removed"):
            planned.prune(architecture, asked.resolved(model="m", trained_length=37), MORE_TOKENS)


def test_every_family_has_a_config_of_its_name() -> None:
    assert {AutoConfig.for_model(name).model_type for name in FAMILIES} == FAMILIES.keys()
    assert COMMON["vocab_size"] == 64
