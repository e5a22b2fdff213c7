"""Attention to a window of the text is refused by name, and never computed as attention to all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import both
from packable import stock as written
from pico_hybrids import FAMILIES, NEW, pico_hybrid

from sparsessm import runtime
from sparsessm.runtime.base import Engine
from sparsessm.runtime.families import plan_of

pytestmark = pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
WORDS = "sliding_window is 4; allowed: null, as the runtime attends to the whole text"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_with_a_window_is_refused(name: str) -> None:
    config = pico_hybrid(name).config
    plan_of(config)
    config.sliding_window = 4
    with pytest.raises(ValueError, match=WORDS):
        plan_of(config)
    config.use_sliding_window = False
    plan_of(config)


@both
def test_both_engines_refuse_it(make: Callable[[Any], Engine]) -> None:
    with pytest.raises(ValueError, match=WORDS):
        make(pico_hybrid("nemotron_h", sliding_window=4))


@pytest.mark.parametrize("name", ["granitemoehybrid", "qwen3_next", "kimi_linear"])
def test_a_layer_that_sees_a_window_is_refused(name: str) -> None:
    config = pico_hybrid(name).config
    config.layer_types = ["linear_attention", "sliding_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layer_types has 'sliding_attention'; supported: attention, full_"):
        plan_of(config)


@pytest.mark.parametrize("name", ["nemotron_h", "jamba"])
def test_a_directory_that_asks_for_a_window_is_refused(name: str, tmp_path: Path) -> None:
    """Jamba's class does not know the field, and would leave it out."""
    written(tmp_path / "in", pico_hybrid(name))
    runtime.load(tmp_path / "in")
    config = tmp_path / "in/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 4}))
    with pytest.raises(ValueError, match=WORDS):
        runtime.load(tmp_path / "in")


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_no_window(name: str) -> None:
    """Else refusing is not enough: models would be pruned by other attention than ours."""
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        full, windowed = (
            pico_hybrid(name, sliding_window=window)(ids, use_cache=False).logits for window in (None, 3)
        )
    assert torch.equal(full, windowed)
