"""The two engines of the runtime made from a stock model in memory, for tests that both must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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
    if not kernels.NATIVE:
        pytest.skip("the native extension is not built")
    return NativeEngine(model.config, packed.of(held(model)).tensors)


both = pytest.mark.parametrize("make", [reference, native])


def held(model: Any) -> Checkpoint:
    """As `sparsessm.load` would give it."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return Checkpoint(model, pico_tokenizer(), "", "transformers", dtypes, None)
