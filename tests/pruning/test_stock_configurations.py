"""Adapters on the models of transformers' own tests: a run of the default, there and back through files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forward import logits_of
from pico import pico_tokenizer
from pico_hybrids import NEW
from stock import TOKENS, assert_same, stock_logits
from stock_configurations import CHANGED, CONFIGURATIONS, stock_model
from transformers import AutoModelForCausalLM

import sparsessm
from sparsessm.architectures import MODEL_TYPES, adapt

pytestmark = pytest.mark.skipif(not NEW, reason="the models of transformers 5")


def test_every_model_type_has_a_row() -> None:
    assert [*CONFIGURATIONS] == [*MODEL_TYPES]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_pruned_model_is_what_stock_code_reads(name: str, tmp_path: Path) -> None:
    """Half of every matrix and of A_log, and every tensor of the result in a stock model again."""
    stock_model(name).save_pretrained(tmp_path / "in")
    pico_tokenizer(99).save_pretrained(tmp_path / "in")
    (tmp_path / "text.txt").write_text(" ".join(f"a state {n} is kept" for n in range(400)))
    model = sparsessm.load(tmp_path / "in")
    expected = stock_logits(stock_model(name))
    assert_same(logits_of(model.architecture(), TOKENS), expected)
    few: dict[str, Any] = {"data": str(tmp_path / "text.txt"), "samples": 4, "length": 20, "measure": False}
    report = sparsessm.prune(model, sparsity=0.5, **few)
    for family in ("ssm", "projections"):
        rows = [row for row in report.rows if row.family == family]
        share = sum(row.pruned for row in rows) / sum(row.total for row in rows)
        assert share == pytest.approx(0.5, abs=0.02)
    sparsessm.save(model, tmp_path / "out", report)
    told: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, experts_implementation="eager"
    )
    stock, found = told
    assert not any(found.values()), found
    assert_same(stock_logits(stock), logits_of(model.architecture(), TOKENS))
    assert not torch.allclose(stock_logits(stock), expected, atol=1e-3)


@pytest.mark.parametrize("name", CHANGED)
def test_what_the_table_changes_is_refused_and_says_why(name: str) -> None:
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; supported: 'silu'"):
        adapt(stock_model(name, **CHANGED[name]))
