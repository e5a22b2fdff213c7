"""The loop over whole units: which go, and what the least squares of what is left make up for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from forward import logits_of, states_of
from lively import ODD, TOKENS, TWO, falcon, heard, mamba, mamba2, name_of, norms, ordered, stock
from silenced import silence, take_out
from stock import difference
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.methods import unit_methods
from sparsessm.pruning import units as loops
from sparsessm.pruning.units import shrink
from sparsessm.recipe.sizes import Order

UNITS = unit_methods()

SHRINKS = [
    (make, axis, method)
    for make, axes in ((mamba, ("state", "channel", "block")), (falcon, ("state", "channel", "block")),
                       (mamba2, ("state", "head", "channel", "block")))
    for axis in axes
    for method, row in UNITS.items()
    if axis in row.axes and not row.projects and not (make is mamba2 and method == "sparsessm-vote")
]  # fmt: skip


@pytest.mark.parametrize("repair", ["none", "dense-target", "dense-target:0.5"])
@pytest.mark.parametrize(("make", "axis", "method"), SHRINKS, ids=name_of)
def test_every_axis_selection_and_repair(
    make: Callable[..., Any], axis: str, method: str, repair: str
) -> None:
    """Sizes, rows, what is left alone; the same bits twice; and a stock model."""
    model = make(num_hidden_layers=3, tie_word_embeddings=False, **(TWO if make is mamba2 else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share = 1 / 3 if axis == "block" else 0.5
    runs = []
    for _ in range(2):
        architecture = adapt(copy.deepcopy(model))
        was = {one.name: one.size for one in architecture.blocks[0].axes} | {"block": 3}
        wanted = ordered(
            architecture, pattern=f"structured:{axis}", method=method, repair=repair, sparsity=share
        )
        rows = shrink(architecture, wanted, TOKENS)
        runs.append((rows, architecture.model.state_dict()))
    (rows, state), (again, other) = runs
    assert rows == again and state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    for name in ("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"):
        assert torch.equal(state[name], before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    size = wanted.sizes[axis]
    assert size == round(was[axis] * (1 - share))
    if axis == "block":
        assert [(row.target, row.total, row.pruned) for row in rows] == [("blocks", 3, 1)]
        assert len(architecture.blocks) == architecture.model.config.num_hidden_layers == 2
    else:
        count = sum(one.name == axis for one in adapt(model).blocks[0].axes)
        for index, row in enumerate(rows):
            assert (row.target, row.layer, row.family) == (f"backbone.layers.{index}.{axis}", index, axis)
            assert (row.total, row.pruned) == (count * was[axis], count * (was[axis] - size))
            assert (row.pattern, row.method, row.removed) == (f"structured:{axis}", method, "cut")
            assert row.repair == {"dense-target": "dense-target:1"}.get(repair, repair)
        assert len(rows) == 3
        for block in architecture.blocks:
            assert {one.size for one in block.axes if one.name == axis} == {size}
    got = stock(architecture.model)
    assert torch.isfinite(got).all() and difference(logits_of(architecture, TOKENS), got) <= 1e-5
    anew = type(model)(copy.deepcopy(architecture.model.config)).eval()
    anew.load_state_dict(state)
    assert torch.equal(stock(anew), got)


@pytest.mark.parametrize("make", [mamba, mamba2])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_what_looks_at_nothing_needs_no_windows(make: Callable[..., Any], method: str) -> None:
    found = []
    for tokens in (None, TOKENS):
        architecture = adapt(make())
        how = {"pattern": "structured:state", "method": method, "repair": "none"}
        wanted = ordered(architecture, **how)
        assert not wanted.looks
        shrink(architecture, wanted, tokens)
        found.append(architecture.model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    "how", [{}, {"method": "exact", "repair": "none"}, {"method": "magnitude"}, {"pattern": "structured"}]
)
def test_what_looks_is_refused_without_windows(how: dict[str, Any]) -> None:
    architecture = adapt(mamba())
    before = stock(architecture.model)
    wanted = ordered(architecture, **{"pattern": "structured:state"} | how)
    assert wanted.looks
    with pytest.raises(ValueError, match="needs calibration windows, but none were given"):
        shrink(architecture, wanted, None)
    assert torch.equal(stock(architecture.model), before)


@pytest.mark.parametrize(
    ("make", "shapes", "axis"),
    [(mamba, {}, "state"), (mamba, ODD, "channel"), (falcon, {}, "channel"), (falcon, ODD, "state"),
     (mamba2, TWO, "state"), (mamba2, TWO, "head"), (mamba2, TWO, "channel"), (mamba2, {}, "head")],
    ids=name_of,
)  # fmt: skip
def test_magnitude_keeps_the_units_of_the_largest_norm_and_touches_nothing_else(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str
) -> None:
    full = make(**shapes, use_bias=True)
    small, by_hand = copy.deepcopy(full), copy.deepcopy(full)
    architecture = adapt(small)
    how = {"pattern": f"structured:{axis}", "method": "magnitude", "repair": "none"}
    wanted = ordered(architecture, **how)
    size = wanted.sizes[axis]
    shrink(architecture, wanted, None)
    keeps = []
    for layer in full.backbone.layers:
        keeps.append(
            [norm >= norm.sort(descending=True).values[size - 1] for norm in norms(layer.mixer, axis)]
        )
    take_out(adapt(by_hand), axis, size, keeps)
    got, want = small.state_dict(), by_hand.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    for layer, masks in zip(full.backbone.layers, keeps, strict=True):
        silence(layer.mixer, axis, masks)
    assert difference(stock(small), stock(full)) <= 1e-5


def fitted(X: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """argmin |X V' - target|^2 / n + added |V - start|^2 as one least squares, by SVD."""
    added = 0.01 * X.square().mean(0).mean()
    count = len(X)
    root = (added * count).sqrt() * torch.eye(X.shape[1], dtype=torch.float64)
    A = torch.cat([X, root])
    b = torch.cat([target, root @ start.T])
    return torch.linalg.lstsq(A, b, driver="gelsd").solution.T


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize(
    ("make", "shapes", "axis"),
    [(mamba, {}, "state"), (mamba, {}, "channel"), (falcon, {}, "state"), (mamba2, TWO, "state"),
     (mamba2, TWO, "head"), (mamba2, {}, "channel"), (mamba, {"num_hidden_layers": 3}, "block")],
    ids=name_of,
)  # fmt: skip
def test_out_proj_is_repaired_by_least_squares(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str, strength: float
) -> None:
    """Of the smaller model's inputs on the dense model's outputs, both heard in the stock forward."""
    tokens = torch.randint(0, 64, (8, 40), generator=torch.Generator().manual_seed(2))
    full = make(**shapes, use_bias=True)
    how: dict[str, Any] = {"pattern": f"structured:{axis}", "method": "random", "sparsity": 0.5}
    kept = list(range(len(full.backbone.layers)))
    for seed in range(20):  # until the first block goes, so that all others have something to repair
        small = copy.deepcopy(full)
        architecture = adapt(small)
        how |= {"seed": seed, "sparsity": 0.34} if axis == "block" else {}
        shrink(architecture, ordered(architecture, repair=f"dense-target:{strength}", **how), tokens)
        if axis == "block":
            kept = [index for index in kept if any(
                torch.equal(full.backbone.layers[index].norm.weight, layer.norm.weight)
                for layer in small.backbone.layers)]  # fmt: skip
            if kept != [1, 2]:
                kept = [0, 1, 2]
                continue
        break
    assert len(kept) == len(small.backbone.layers)
    for now, layer in enumerate(kept):
        mixer, repaired = full.backbone.layers[layer].mixer, small.backbone.layers[now].mixer
        weight = mixer.out_proj.weight.detach().double()
        start = weight
        if axis in ("channel", "head"):
            start = weight[:, survivors(mixer, repaired)]
        best = fitted(heard(small, now, tokens=tokens), heard(full, layer, tokens=tokens) @ weight.T, start)
        want = start + strength * (best - start)
        got = repaired.out_proj.weight.detach()
        assert difference(got.double(), want) <= 2e-3
        assert difference(start, want) > 1e-2
        assert torch.equal(repaired.out_proj.bias, mixer.out_proj.bias)


def survivors(full: Any, small: Any) -> Tensor:
    """(D,) bool: channels whose vectors are still there; those of a norm with the factor that it got."""
    if hasattr(full, "num_heads"):
        factor = (len(full.norm.weight) / len(small.norm.weight)) ** 0.5
        distances = (full.norm.weight[:, None] * factor - small.norm.weight).abs().amin(1)
        return distances <= 1e-6 * full.norm.weight.abs()
    return torch.isin(full.D, small.D)


def errors(full: Any, small: Any, tokens: Tensor) -> float:
    """Mean squared difference of the last residual stream."""
    return float((states_of(adapt(full), tokens) - states_of(adapt(small), tokens)).square().mean())


@pytest.mark.parametrize(
    ("make", "shapes", "axis"),
    [(mamba, {}, "state"), (mamba, {}, "channel"), (falcon, {}, "channel"), (mamba2, TWO, "state"),
     (mamba2, TWO, "head"), (mamba2, {}, "channel")],
    ids=name_of,
)  # fmt: skip
def test_exact_with_repair_is_nearer_to_the_dense_model_than_random_without(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str
) -> None:
    tokens = torch.randint(0, 64, (16, 128), generator=torch.Generator().manual_seed(2))
    full, found = make(**shapes), {}
    for method in ("exact", "random"):
        for repair in ("none", "dense-target"):
            architecture = adapt(copy.deepcopy(full))
            how = {"method": method, "repair": repair, "price": "none"}
            shrink(architecture, ordered(architecture, pattern=f"structured:{axis}", **how), tokens)
            found[method, repair] = errors(full, architecture.model, tokens)
    assert found["exact", "dense-target"] < 0.7 * found["random", "none"]
    for method in ("exact", "random"):
        assert found[method, "dense-target"] < found[method, "none"]


def test_states_that_do_nothing_go_first_and_cost_nothing() -> None:
    """C rows of three states are zero: every selection that looks at the states finds them."""
    for method in ("exact", "ghost"):
        full = mamba()
        for layer in full.backbone.layers:
            with torch.no_grad():
                layer.mixer.x_proj.weight[-8:][[1, 4, 6]] = 0.0
        architecture = adapt(copy.deepcopy(full))
        wanted = ordered(
            architecture, pattern="structured:state", sparsity=3 / 8, method=method, repair="none"
        )
        shrink(architecture, wanted, TOKENS)
        assert difference(stock(architecture.model), stock(full)) <= 1e-5
        for small, layer in zip(architecture.model.backbone.layers, full.backbone.layers, strict=True):
            assert torch.equal(small.mixer.A_log, layer.mixer.A_log[:, [0, 2, 3, 5, 7]])


def test_a_duplicated_state_costs_nothing_where_readouts_can_be_mixed() -> None:
    """Two states with one decay and one B are one state: its partner's readout takes over, exactly."""
    full = mamba()
    for layer in full.backbone.layers:
        with torch.no_grad():
            layer.mixer.A_log[:, 5] = layer.mixer.A_log[:, 2]
            layer.mixer.x_proj.weight[3 + 5] = layer.mixer.x_proj.weight[3 + 2]
    architecture = adapt(copy.deepcopy(full))
    wanted = ordered(architecture, pattern="structured:state", sparsity=1 / 8, price="none")
    tokens = torch.randint(0, 64, (8, 64), generator=torch.Generator().manual_seed(2))
    shrink(architecture, wanted, tokens)
    for small, layer in zip(architecture.model.backbone.layers, full.backbone.layers, strict=True):
        decays = layer.mixer.A_log[:, [n for n in range(8) if n != 5]]
        assert torch.equal(small.mixer.A_log.sort(1).values, decays.sort(1).values), "one of the two went"
    repaired = errors(full, architecture.model, tokens)
    plain = adapt(copy.deepcopy(full))
    shrink(
        plain,
        ordered(plain, pattern="structured:state", sparsity=1 / 8, price="none", repair="none"),
        tokens,
    )
    assert repaired < 0.05 * errors(full, plain.model, tokens)


def test_a_state_that_is_read_alike_costs_nothing_where_inputs_can_be_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two states with one decay and one readout but for a factor are one state with another input."""
    full = mamba()
    for layer in full.backbone.layers:
        with torch.no_grad():
            layer.mixer.A_log[:, 5] = layer.mixer.A_log[:, 2]
            layer.mixer.x_proj.weight[3 + 8 + 5] = -0.7 * layer.mixer.x_proj.weight[3 + 8 + 2]
    tokens = torch.randint(0, 64, (8, 64), generator=torch.Generator().manual_seed(2))
    last = replace(UNITS["random"], score=lambda units: [torch.arange(8).eq(5).logical_not().double()])
    found = []
    for strength, most in ((1.0, loops.MAX_STATES), (1.0, 0), (0.0, 0)):
        monkeypatch.setattr(loops, "MAX_STATES", most)  # 0: readouts alone
        architecture = adapt(copy.deepcopy(full))
        wanted = Order({"state": 7}, {"state": last}, strength=strength, priced=False)
        shrink(architecture, wanted, tokens)
        for small, layer in zip(architecture.model.backbone.layers, full.backbone.layers, strict=True):
            assert torch.equal(small.mixer.A_log, layer.mixer.A_log[:, [0, 1, 2, 3, 4, 6, 7]])
        found.append(errors(full, architecture.model, tokens))
    both, readouts, nothing = found
    assert both < 0.1 * nothing and both < 0.2 * readouts


def test_what_is_not_finite_names_the_block() -> None:
    model = mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[0] = torch.inf
    for method in ("exact", "magnitude"):
        architecture = adapt(copy.deepcopy(model))
        wanted = ordered(architecture, pattern="structured:channel", method=method, price="none")
        with pytest.raises(ValueError, match="backbone.layers.1"):
            shrink(architecture, wanted, TOKENS)


@pytest.mark.parametrize("seed", range(4))  # one of which takes the last block
def test_progress_ends_where_it_should(seed: int) -> None:
    seen: list[tuple[str, int, int, str]] = []
    architecture = adapt(mamba(num_hidden_layers=3))
    how = {"method": "random", "seed": seed} if seed else {}
    wanted = ordered(architecture, pattern="structured:state=0.5,block=0.33", **how)
    shrink(architecture, wanted, TOKENS, lambda *what: seen.append(what))
    last = {stage: (done, total) for stage, done, total, _ in seen}
    assert all(done == total for done, total in last.values()), last
    assert last.keys() == ({"shrink"} if seed else {"fisher", "blocks", "shrink"})
