"""The two engines of the runtime made from a stock model in memory, for tests that both must pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico import pico_tokenizer

from sparsessm import kernels
from sparsessm.checkpoint import Checkpoint, packed
from sparsessm.runtime.base import Engine
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.reference import ReferenceEngine

Make = Callable[[Any], Engine]


def reference(model: Any) -> Engine:
    return ReferenceEngine(model.config, model.state_dict())


def native(model: Any) -> Engine:
    if kernels.LEVEL == "reference":
        pytest.skip("the native kernels are not built, or held back")
    return NativeEngine(model.config, packed.of(held(model)).tensors)


needs_native = pytest.mark.skipif(kernels.LEVEL == "reference", reason="no native kernels run")
both = pytest.mark.parametrize("make", [reference, native])


def stepped(engine: Engine, ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence, token by token."""
    return torch.cat([engine.step(token[None], state) for token in ids])


def assert_rows_are_alone(
    engine: Engine, draw: Callable[[int, int], torch.Tensor], rows: int, threads: Callable[[int], None]
) -> None:
    """A row of a batch is bit for bit what it is alone, whatever the number of threads of the batch.

    Args:
        draw: (number of tokens, seed) -> tokens. threads: sets the number of them, which is 1 otherwise.
    """
    states = engine.new_state(rows)
    for row in range(rows):
        engine.prompt(draw(3 + 2 * row, row), states[row])
    alone = states.clone()
    for turn in range(3):
        ids = draw(rows, turn)
        threads(1 + turn)
        together = engine.step(ids, states)
        threads(1)
        for row in range(rows):
            assert torch.equal(engine.step(ids[row : row + 1], alone[row : row + 1])[0], together[row])
        assert torch.equal(alone, states)


def last_bits(model: Any, ids: torch.Tensor) -> float:
    """What the last bit of every weight does to a stock model's logits, relative to the largest: no engine in
    float32 can be held to less, on any processor. FalconMamba's norms of small vectors make it large."""
    random, most = torch.Generator().manual_seed(0), 0.0
    with torch.inference_mode():
        want = model(ids[None], use_cache=False).logits
        for _ in range(3):
            other = copy.deepcopy(model)
            for weight in other.parameters():
                weight.mul_(1 + (torch.rand(weight.shape, generator=random) - 0.5) * 2**-22)
            change = other(ids[None], use_cache=False).logits - want
            most = max(most, float(change.abs().max() / want.abs().max()))
    return most


def held(model: Any) -> Checkpoint:
    """As `sparsessm.load` would give it."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return Checkpoint(model, pico_tokenizer(), "", "transformers", dtypes, None)
