"""The precision of a model's products: who rounds, what is left behind, and how much it changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from pico_hybrids import DISTINCT, pico_hybrid
from torch import Tensor, nn

from sparsessm.architectures import Architecture, adapt
from sparsessm.calibration.loss import losses
from sparsessm.calibration.prices import row_prices
from sparsessm.calibration.walk import final, walk
from sparsessm.kernels import products
from sparsessm.methods.observers import InputGram

MODELS: dict[str, Callable[[], Any]] = {
    "mamba": pico_mamba,
    "falcon_mamba": pico_falcon_mamba,
    "mamba2": pico_mamba2,
    **{name: lambda name=name: pico_hybrid(name) for name in DISTINCT},
}
TOKENS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def moments(architecture: Architecture) -> dict[str, Tensor]:
    """Of every linear layer's inputs, in one pass."""
    found = {}
    for stop in walk(architecture, TOKENS, tail=True):
        seen = {t.kind: InputGram() for t in stop.block.targets if t.family in ("projections", "head")}
        stop.run(seen)
        found |= {stop.block.target(kind).name: one.result().gram for kind, one in seen.items()}
    return found


def test_rounding_changes_a_little_everywhere_and_leaves_the_model_as_it_was(model: Any) -> None:
    dense, rounds = adapt(model), adapt(model, compute="bfloat16")
    weights = copy.deepcopy(model.state_dict())
    expected, got = final(dense, TOKENS)[0], final(rounds, TOKENS)[0]
    assert 0 < (expected - got).norm() < 0.02 * expected.norm()
    assert 0 < (losses(dense, TOKENS) - losses(rounds, TOKENS)).abs().max() < 0.02
    exact, coarse = moments(dense), moments(rounds)
    for name, gram in exact.items():
        # a router may send another token to an expert of few
        assert ".experts." in name or (gram - coarse[name]).norm() < 0.05 * gram.norm(), name
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_every_linear_target_is_rounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a block's targets that are matrices of linear layers or experts, and no other product."""
    architecture = adapt(model, compute="bfloat16")
    seen: set[int] = set()
    monkeypatch.setattr(products, "units", lambda: ())  # so that every weight passes `rounded`
    whole = products.rounded
    monkeypatch.setattr(products, "rounded", lambda x: seen.add(x.data_ptr()) or whole(x))
    losses(architecture, TOKENS)
    for target in architecture.targets:
        if target.family in ("projections", "head"):
            assert target.matrix.data_ptr() in seen, target.name
        else:
            assert target.matrix.data_ptr() not in seen, target.name


def test_what_multiplies_is_the_same_up_to_the_order_of_sums(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = adapt(model, compute="bfloat16")
    here = final(architecture, TOKENS)[0]
    monkeypatch.setattr(products, "units", lambda: ())
    other = final(architecture, TOKENS)[0]
    assert (here - other).norm() < 0.01 * other.norm()  # a sum that rounds to another bfloat16 now and then


def test_prices_are_the_same_up_to_rounding(model: Any) -> None:
    dense, rounds = adapt(model), adapt(model, compute="bfloat16")
    exact, coarse = (row_prices(one, TOKENS, head=True) for one in (dense, rounds))
    assert exact.keys() == coarse.keys()
    for name, price in exact.items():
        assert ".experts." in name or 0 < (price - coarse[name]).norm() < 0.2 * price.norm(), name
    assert not any("forward" in vars(module) for module in model.modules())


def test_hooks_of_linear_layers_hear_the_rounded_product() -> None:
    architecture = adapt(pico_mamba(), compute="bfloat16")
    block = architecture.blocks[0]
    hidden = torch.randn(1, 5, 16)
    with torch.inference_mode(), block.computing("bfloat16"), block.outputs() as outputs:
        block.forward(hidden)
    for name, module in block.linear().items():
        assert isinstance(module, nn.Linear) and name in outputs


def test_float32_touches_no_module() -> None:
    block = adapt(pico_mamba()).blocks[0]
    with block.computing("float32"):
        assert not any("forward" in vars(module) for module in block.linear().values())
    with block.computing("bfloat16"):
        assert all("forward" in vars(module) for module in block.linear().values())
