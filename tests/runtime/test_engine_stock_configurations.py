"""The runtime on the models of transformers' own tests: logits, and 512 greedy tokens."""

from __future__ import annotations

import pytest
import torch
from engines import native, needs_native
from pico_hybrids import NEW
from stock import stock_logits
from stock_configurations import CONFIGURATIONS, stock_model

from sparsessm.runtime.base import FIELDS

pytestmark = pytest.mark.skipif(not NEW, reason="the models of transformers 5")
GREEDY = 512


@needs_native
@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name in FIELDS])
def test_logits_and_512_greedy_tokens_are_those_of_the_stock_model(name: str) -> None:
    """Our tokens are read by the stock model at once: after each it must choose the next one, as we did.

    That is what its own greedy decoding would give, by induction, at the cost of one pass."""
    model = stock_model(name)
    engine = native(model)
    state, chosen, rows = engine.keys.room(engine.new_state(1), GREEDY)[0], [7], []
    for _ in range(GREEDY):
        rows.append(engine.step(torch.tensor(chosen[-1:]), [state])[0])
        chosen.append(int(rows[-1].argmax()))
    read = torch.tensor(chosen[:-1])
    expected = stock_logits(model, read[None])[0]
    bound = 2e-5 * expected.abs().max()
    # of two logits that are nearer than what is allowed below, another processor may choose the other one
    assert (expected.amax(1) - expected.gather(1, torch.tensor(chosen[1:])[:, None])[:, 0]).max() < 2 * bound
    state = engine.keys.room(engine.new_state(1), GREEDY)[0]
    for found in (torch.stack(rows), engine.prompt(read, state, every=True)):
        assert (found - expected).abs().max() < bound
