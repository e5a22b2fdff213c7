"""States projected by `balanced`: what changes, how directions are shared out, who is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import TOKENS, lively, ordered, stock
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from pico_hybrids import pico_hybrid
from projections import NAME, WORDS, by_hand, ids_of, made, settled, with_projections
from stock import difference
from torch import Tensor

from sparsessm.architectures import adapt, projected
from sparsessm.methods.balanced import balanced_truncation
from sparsessm.methods.observers import StateMoments
from sparsessm.pruning import preview
from sparsessm.pruning.projection import allot

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("price", ["none", None])
@pytest.mark.parametrize("repair", ["none", None])
@pytest.mark.parametrize(
    ("groups", "sparsity", "left"), [(1, 0.5, 4), (2, 0.75, 2), (4, 0.875, 1), (2, 0.125, 7)]
)
def test_nothing_but_mixers_two_matrices_and_the_cache_change(
    groups: int, sparsity: float, left: int, repair: str | None, price: str | None
) -> None:
    model = lively(pico_mamba2(n_groups=groups, num_hidden_layers=3))
    how = {"sparsity": sparsity, "repair": repair, "price": price}
    small, rows = settled(model, **how)
    found = projected.directions_of(small)
    counts = {layer: found.get(layer, 8) for layer in range(3)}
    assert sum(counts.values()) == 3 * left and min(counts.values()) >= 1
    before, after = model.state_dict(), small.state_dict()
    added = {NAME.format(layer, matrix) for layer in found for matrix in projected.MATRICES}
    assert after.keys() - before.keys() == added
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for layer in found:
        for matrix in projected.MATRICES:
            tensor = after[NAME.format(layer, matrix)]
            assert tensor.shape == (groups, counts[layer], 8) and tensor.isfinite().all()
    config, told = model.config.to_dict(), small.config.to_dict()
    assert {name for name in config if config[name] != told[name]} == {"use_cache"}
    assert small.config.use_cache is False and model.config.use_cache is True
    for name, module in model.named_modules():
        is_new = name in {f"backbone.layers.{layer}.mixer" for layer in found}
        assert type(small.get_submodule(name)) is (projected.ProjectedMixer if is_new else type(module)), name
    for index, row in enumerate(rows):
        assert (row.target, row.layer, row.family) == (f"backbone.layers.{index}.state", index, "state")
        assert (row.removed, row.method, row.repair, row.repaired) == ("projected", "balanced", "none", ())
        assert (row.total, row.pruned) == (8 * groups, (8 - counts[index]) * groups)
        assert row.price == (price or "fisher")
    again, same = settled(model, **how)
    assert same == rows and all(torch.equal(t, again.state_dict()[name]) for name, t in after.items())


def test_a_layer_that_nobody_hears_gives_its_directions_to_the_other() -> None:
    model = lively(pico_mamba2())
    model.backbone.layers[0].mixer.out_proj.weight.data.mul_(1e-6)
    small, rows = settled(model, ids_of(8 * 64).view(8, 64), price="none")
    assert projected.directions_of(small) == {0: 1, 1: 7} and [row.pruned for row in rows] == [14, 2]


@pytest.mark.parametrize("layer", [0, 1])
def test_every_layer_is_seen_as_it_is_in_the_dense_model(layer: int) -> None:
    model, tokens = lively(pico_mamba2()), ids_of(8 * 64).view(8, 64)
    small, _ = settled(model, tokens, price="none")
    block, moments = adapt(model).blocks[layer], StateMoments(4)  # 16 looks for each of 8 states
    with torch.inference_mode():
        hidden = model.backbone.embeddings(tokens)
        for before in model.backbone.layers[:layer]:
            hidden = before(hidden)
        block.forward(hidden, taps={"states": moments}, until="states")
    r = projected.directions_of(small)[layer]
    B, C = balanced_truncation(moments.result(), r)
    mixer = small.backbone.layers[layer].mixer
    found = mixer.C_projection.detach().double().mT @ mixer.B_projection.detach().double()
    assert difference(found, C.mT @ B) <= 1e-3


@pytest.mark.parametrize("price", ["none", None])
@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_what_is_not_finite_names_the_block(value: float, price: str | None) -> None:
    model = lively(pico_mamba2())
    model.backbone.layers[1].mixer.in_proj.weight.data.fill_(value)
    with pytest.raises(ValueError, match=r"^backbone\.layers\.1: .* not finite"):
        settled(model, price=price)


@given(layers=st.integers(1, 4), states=st.integers(2, 5), data=st.data())
@settings(deadline=None, max_examples=60)
def test_directions_are_shared_out_so_that_the_most_energy_stays(
    layers: int, states: int, data: st.DataObject
) -> None:
    """Against all ways to share them out; many energies are equal, or zero."""
    mean = data.draw(st.integers(1, states))
    each = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=states, max_size=states)
    table = [torch.tensor(sorted(data.draw(each), reverse=True), dtype=torch.float64) for _ in range(layers)]
    before = [row.clone() for row in table]
    counts = allot(table, mean)
    assert (
        len(counts) == layers and sum(counts) == layers * mean and 1 <= min(counts) <= max(counts) <= states
    )
    assert all(torch.equal(row, was) for row, was in zip(table, before, strict=True))

    def kept(shares: Sequence[int]) -> float:
        return sum(float(row[:count].sum()) for row, count in zip(table, shares, strict=True))

    ways = itertools.product(range(1, states + 1), repeat=layers)
    assert kept(counts) == max(kept(way) for way in ways if sum(way) == layers * mean)


def doubled(model: Any, kind: str) -> Any:
    """Every second B (or C) is a copy of the one before it: half of the directions are enough."""
    for layer in model.backbone.layers:
        mixer = layer.mixer
        inner, states, groups = mixer.intermediate_size, mixer.ssm_state_size, mixer.n_groups
        start = inner + (groups * states if kind == "C" else 0)
        for at in range(start, start + groups * states, 2):
            mixer.in_proj.weight.data[inner + at + 1] = mixer.in_proj.weight.data[inner + at]
            for tensor in (mixer.conv1d.weight.data, mixer.conv1d.bias.data):
                tensor[at + 1] = tensor[at]
    return model


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["B", "C"])
def test_directions_that_are_enough_lose_nothing_where_states_do(kind: str, groups: int) -> None:
    model = doubled(lively(pico_mamba2(n_groups=groups)), kind)
    want = stock(model)
    many = ids_of(8 * 64).view(8, 64)  # one in 16 is looked at: more readouts than there are states
    errors = {method: difference(stock(settled(model, many, method=method)[0]), want)
              for method in ("balanced", "exact", "ghost")}  # fmt: skip
    assert errors["balanced"] <= 2e-4
    assert min(errors["exact"], errors["ghost"]) > 50 * errors["balanced"], errors
    less = difference(stock(settled(model, many, sparsity=0.625)[0]), want)
    assert less > 10 * errors["balanced"], "a direction less is too few"


def test_who_cannot_be_projected_is_told_so() -> None:
    for model, kind in (
        (pico_mamba(), "Mamba"),
        (pico_falcon_mamba(), "FalconMamba"),
        (pico_hybrid("bamba"), "Bamba"),
    ):
        architecture = adapt(model)
        words = f"method 'balanced' projects the states of Mamba-2 models; this is a {kind}"
        with pytest.raises(ValueError, match=words):
            ordered(architecture, **WORDS)
        matrices = torch.zeros(2, 1, 4, 8)
        with pytest.raises(ValueError, match="cannot be projected"):
            architecture.project(architecture.blocks[0], *matrices)
    with pytest.raises(ValueError, match="of 1 units; possible shares: none"):
        ordered(adapt(pico_mamba2(state_size=1)), **WORDS)


@pytest.mark.parametrize("axis", ["state", "head", "channel"])
@pytest.mark.parametrize("method", ["balanced", "exact"])
def test_what_is_projected_loses_blocks_and_nothing_else(axis: str, method: str) -> None:
    architecture = adapt(made("two groups, 3 and 5 of 8"))
    assert architecture.structure == ("block",) and not architecture.projects
    words = f"pattern 'structured:{axis}': only blocks can be removed from a model with projected states"
    if method == "balanced":
        words = "projects the states of Mamba-2 models; the states of this one are projected already"
        words = words if axis == "state" else "method 'balanced' needs the pattern structured:state"
    with pytest.raises(ValueError, match=words):
        ordered(architecture, pattern=f"structured:{axis}", method=method)


@pytest.mark.parametrize("repair", ["none", None])
def test_a_projected_model_loses_a_block(repair: str | None) -> None:
    model = with_projections(lively(pico_mamba2(num_hidden_layers=3)), {0: 3, 1: 5, 2: 1})
    small, rows = settled(model, pattern="structured:block", method="exact", sparsity=1 / 3, repair=repair)
    assert [(row.target, row.pruned, row.removed) for row in rows] == [("blocks", 1, "cut")]
    assert small.config.num_hidden_layers == 2 and torch.isfinite(stock(small)).all()
    left = list(projected.directions_of(small).values())
    gone = next(index for index in range(3) if left == [r for i, r in enumerate((3, 5, 1)) if i != index])
    by_list = copy.deepcopy(model)
    del by_list.backbone.layers[gone]
    by_list.config.num_hidden_layers = 2
    same = torch.equal(stock(small), stock(by_list))
    assert same if repair else not same
    assert difference(stock(small), by_hand(small, TOKENS).float()) <= 2e-5


def changed(model: Any, small: Any) -> set[str]:
    """Kinds of tensors that are neither the same nor have fewer of the same rows and columns."""
    before, after = model.state_dict(), small.state_dict()

    def part(old: Tensor, new: Tensor) -> bool:
        if old.ndim == 0 or new.ndim != old.ndim:
            return torch.equal(old, new)
        for dim in range(old.ndim):
            if old.shape[dim] != new.shape[dim]:
                there = {tuple(row.flatten().tolist()) for row in old.movedim(dim, 0)}
                return all(tuple(row.flatten().tolist()) in there for row in new.movedim(dim, 0))
        return torch.equal(old, new)

    wrong = [name for name in before if not part(before[name], after[name])]
    return {name.split("mixer.")[-1] for name in wrong}


MAKES: dict[str, Callable[..., Any]] = {
    "mamba": pico_mamba,
    "falcon": pico_falcon_mamba,
    "mamba2": pico_mamba2,
}


@pytest.mark.parametrize("method", ["exact", "ghost", "magnitude"])
@pytest.mark.parametrize(
    ("kind", "fields", "told", "kinds"),
    [
        ("mamba2", {}, None, []),
        ("mamba2", {"n_groups": 1}, None, []),
        ("mamba2", {}, "dense-target", ["in_proj", "out_proj"]),
        ("mamba2", {}, "none", []),
        ("mamba", {}, None, ["x_proj"]),
        ("mamba", {}, "dense-target", ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("mamba", {"state_size": 33}, None, ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("falcon", {}, None, ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("falcon", {}, "none", []),
    ],
)
def test_states_alone_are_no_reason_to_refit(
    kind: str, fields: dict[str, Any], told: str | None, kinds: list[str], method: str
) -> None:
    model = lively(MAKES[kind](**fields, **({} if kind == "mamba2" else {"time_step_rank": 3})))
    small, rows = settled(model, method=method, repair=told, sparsity=0.5)
    found = changed(model, small)
    assert found <= {f"{name}.weight" for name in kinds}
    if kinds:  # in_proj of the first layer is fed what it was; that of the others is not
        assert found == {f"{name}.weight" for name in kinds}
    for index, row in enumerate(rows):
        said = {NAME.format(index, f"{name}.weight") for name in kinds}
        assert set(row.repaired) == said and row.repair == ("dense-target:1" if kinds else "none")


@pytest.mark.parametrize("method", ["balanced", "exact"])
def test_a_preview_promises_no_refit_that_is_not_done(method: str) -> None:
    architecture = adapt(pico_mamba2())
    assert (
        preview.units(ordered(architecture, **WORDS | {"method": method}), architecture)["repair"] == "none"
    )


def test_a_preview_does_not_guess_how_many_parameters_come() -> None:
    architecture = adapt(pico_mamba2())
    told = preview.units(ordered(architecture, **WORDS), architecture)["parameters"]
    assert told == {"now": sum(p.numel() for p in architecture.model.parameters()), "after": None}


@pytest.mark.parametrize(("share", "left"), [(0.01, 7), (0.99, 1), (0.4, 5)])
def test_any_share_is_possible_and_something_goes(share: float, left: int) -> None:
    assert ordered(adapt(pico_mamba2()), **WORDS | {"sparsity": share}).sizes == {"state": left}
