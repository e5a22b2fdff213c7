"""pruning/mixes.py: what sizes save, the cheapest sizes of all, and the search on a model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2

from sparsessm.architectures import Architecture, adapt
from sparsessm.pruning import mixes
from sparsessm.pruning.mixes import SLACK, Trial, cheapest, find, predicted, saved
from sparsessm.pruning.units import shrink
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.sizes import Order, order, possible, size_of

TOKENS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


def mamba(**how: Any) -> Any:
    return pico_mamba(num_hidden_layers=4, time_step_rank=3, **how)


def falcon(**how: Any) -> Any:
    return pico_falcon_mamba(num_hidden_layers=4, time_step_rank=3, **how)


def mamba2(**how: Any) -> Any:
    shapes = {"num_heads": 8, "head_dim": 8, "expand": 4, "n_groups": 2, "num_hidden_layers": 4}
    return pico_mamba2(**{**shapes, **how})


def count(architecture: Architecture) -> int:
    return sum(parameter.numel() for parameter in architecture.model.parameters())


def shrunk(architecture: Architecture, sizes: dict[str, int]) -> Architecture:
    """A copy with these sizes, units drawn at random."""
    made = adapt(copy.deepcopy(architecture.model))
    pattern = "structured:" + next(iter(sizes))
    one = order(Recipe(pattern=pattern, method="random", repair="none"), made)
    selections = dict.fromkeys(sizes, next(iter(one.methods.values())))
    shrink(made, Order(sizes, selections, strength=0.0, priced=False), None)
    return made


MAMBAS = {
    "mamba": adapt(mamba(use_bias=True)),
    "falcon": adapt(falcon()),
    "untied": adapt(mamba(tie_word_embeddings=False, use_conv_bias=False)),
}
MAMBAS2 = {
    "two": adapt(mamba2(use_bias=True)),
    "one": adapt(mamba2(n_groups=1, use_conv_bias=False)),
    "four": adapt(mamba2(n_groups=4, state_size=3)),
    "thin": adapt(mamba2(head_dim=2, expand=1, hidden_size=16)),
}


@settings(deadline=None, max_examples=25)
@given(data=st.data(), name=st.sampled_from([*MAMBAS, *MAMBAS2]))
def test_what_is_said_to_be_saved_is_gone(data: st.DataObject, name: str) -> None:
    architecture = {**MAMBAS, **MAMBAS2}[name]
    sizes = {}
    for axis in architecture.structure:
        options = [size_of(architecture, axis), *architecture.sizes(axis)]
        if data.draw(st.booleans()) and len(options) > 1:
            sizes[axis] = data.draw(st.sampled_from(options))
    if not sizes or not mixes._sayable(architecture, sizes):
        return
    assert saved(architecture, sizes) == count(architecture) - count(shrunk(architecture, sizes))


@pytest.mark.parametrize(
    "sizes",
    [{"head": 2, "state": 3}, {"channel": 4, "state": 5}, {"channel": 4, "head": 2},
     {"channel": 4, "head": 2, "state": 1}, {"head": 1, "block": 3}, {"channel": 4, "head": 2, "block": 1},
     {"channel": 8, "head": 2}, {"channel": 4, "head": 4}, {"channel": 8, "head": 4, "state": 8, "block": 4}],
    ids=str,
)  # fmt: skip
def test_heads_channels_and_states_together(sizes: dict[str, int]) -> None:
    architecture = MAMBAS2["two"]
    assert saved(architecture, sizes) == count(architecture) - count(shrunk(architecture, sizes))


def test_nothing_is_saved_by_what_is_there() -> None:
    for architecture in (MAMBAS["mamba"], MAMBAS2["two"]):
        now = {axis: size_of(architecture, axis) for axis in architecture.structure}
        assert saved(architecture, now) == saved(architecture, {}) == 0


# curves


def test_a_curve_goes_through_what_was_measured() -> None:
    curve = [Trial("state", 6, 100, 0.01), Trial("state", 4, 200, 0.05)]
    assert predicted(curve, 0) == 0
    assert predicted(curve, 100) == pytest.approx(0.01) and predicted(curve, 200) == pytest.approx(0.05)
    power = math.log(5) / math.log(2)
    assert predicted(curve, 400) == pytest.approx(0.05 * 2**power)
    assert predicted(curve, 50) == pytest.approx(0.01 / 2**power)


@settings(deadline=None, max_examples=100)
@given(
    points=st.lists(st.tuples(st.integers(1, 10**6), st.floats(-1, 20)), min_size=1, max_size=2),
    gone=st.lists(st.integers(1, 2 * 10**6), min_size=2, max_size=2, unique=True),
)
def test_a_curve_grows(points: list[tuple[int, float]], gone: list[int]) -> None:
    """More is dearer, never by less than in proportion, and a loss below zero is no gift."""
    curve = [Trial("state", 1, x, y) for x, y in points]
    if len({x for x, _ in points}) < len(points):
        return
    less, more = sorted(gone)
    low, high = predicted(curve, less), predicted(curve, more)
    assert 0 < low and math.isfinite(high)
    if len(points) == 1:
        assert high == pytest.approx(low * more / less)
    else:
        (x0, y0), (x1, y1) = sorted((x, max(y, 1e-6)) for x, y in points)
        if x1 * y0 <= y1 * x0 and y1 * x0**4 <= y0 * x1**4:  # a power from 1 to 4
            assert predicted(curve, x0) == pytest.approx(y0) and predicted(curve, x1) == pytest.approx(y1)
            assert high / low >= (more / less) * (1 - 1e-9)


def curves(architecture: Architecture, seed: int) -> list[Trial]:
    """Losses made up, at the sizes that would be tried."""
    random = torch.Generator().manual_seed(seed)
    trials = []
    for axis in architecture.structure:
        rate = float(torch.rand(1, generator=random)) * 1e-4
        power = 1 + 2 * float(torch.rand(1, generator=random))
        for size in mixes._tried(architecture, axis):
            gone = saved(architecture, {axis: size})
            trials.append(Trial(axis, size, gone, rate * gone**power / 1000 ** (power - 1)))
    return trials


@pytest.mark.parametrize("name", ["mamba", "two", "four"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.45])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cheapest_sizes_are_those_of_brute_force(
    name: str, share: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixes, "SLACK", 0.03)  # pico models have few sizes
    architecture = {**MAMBAS, **MAMBAS2}[name]
    trials = curves(architecture, seed)
    total = count(architecture)
    best, found = math.inf, {}
    axes = list(architecture.structure)
    for sizes in itertools.product(
        *([size_of(architecture, axis), *possible(architecture, axis)] for axis in axes)
    ):
        chosen = dict(zip(axes, sizes, strict=True))
        fewer = {axis: size for axis, size in chosen.items() if size < size_of(architecture, axis)}
        if name != "mamba" and not fits(architecture, fewer):
            continue
        gone = saved(architecture, fewer)
        if not gone or not share - 0.03 <= gone / total <= 1.5 * share + 0.03:
            continue
        loss = sum(
            predicted([t for t in trials if t.axis == axis], saved(architecture, {axis: size}))
            for axis, size in fewer.items()
        )
        if loss < best:
            best, found = loss, fewer
    assert found
    got = cheapest(architecture, trials, share)
    cost = sum(
        predicted([t for t in trials if t.axis == axis], saved(architecture, {axis: size}))
        for axis, size in got.items()
    )
    assert cost == pytest.approx(best, rel=1e-9)
    made = shrunk(architecture, got)  # can really be made
    assert share - 0.03 <= (total - count(made)) / total <= 1.5 * share + 0.03


def fits(architecture: Architecture, sizes: dict[str, int]) -> bool:
    """Channels of all heads are a multiple of the stream after each axis: first channels, then heads."""
    config = architecture.model.config
    heads, channels = config.num_heads, config.head_dim
    for axis in ("channel", "head"):
        channels = sizes.get("channel", channels)
        if axis == "head":
            heads = sizes.get("head", heads // config.n_groups) * config.n_groups
        if heads * channels % config.hidden_size:
            return False
    return True


def test_a_dear_axis_is_left_alone() -> None:
    architecture = MAMBAS["mamba"]
    trials = [
        Trial(t.axis, t.size, t.saved, t.loss * (1e6 if t.axis != "channel" else 1))
        for t in curves(architecture, 0)
    ]
    share = saved(architecture, {"channel": 16}) / count(architecture)
    assert cheapest(architecture, trials, share) == {"channel": 16}


def test_a_larger_step_is_taken_where_it_is_the_cheaper() -> None:
    """Half of the channels of a head or nothing: what is asked for lies below, blocks would be dear."""
    architecture = MAMBAS2["two"]
    trials = [
        Trial(t.axis, t.size, t.saved, t.loss * (1e6 if t.axis != "channel" else 1))
        for t in curves(architecture, 0)
    ]
    size = max(possible(architecture, "channel"))
    gone = saved(architecture, {"channel": size}) / count(architecture)
    assert cheapest(architecture, trials, 0.7 * gone) == {"channel": size}
    assert cheapest(architecture, trials, 0.5 * gone) != {"channel": size}, "not any step"


def test_a_share_that_nothing_saves_says_what_can_go() -> None:
    architecture = MAMBAS["mamba"]
    most = {axis: possible(architecture, axis)[0] for axis in architecture.structure}
    share = saved(architecture, most) / count(architecture)
    with pytest.raises(
        ValueError, match=f"save 0.95 of the parameters; the nearest possible share is {share:.3g}$"
    ):
        cheapest(architecture, curves(architecture, 0), 0.95)


# the search


@pytest.mark.parametrize("share", [0.1, 0.25])
@pytest.mark.parametrize("make", [mamba, falcon, mamba2])
def test_the_search_reaches_the_share_and_leaves_the_model_alone(
    make: Callable[..., Any], share: float
) -> None:
    architecture = adapt(make())
    before = {name: tensor.clone() for name, tensor in architecture.model.state_dict().items()}
    config = architecture.model.config.to_dict()
    wanted = order(Recipe(pattern="structured", sparsity=share), architecture)
    seen: list[tuple[str, int, int, str]] = []
    got, trials = find(architecture, wanted, TOKENS, lambda *what: seen.append(what))
    state = architecture.model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    assert architecture.model.config.to_dict() == config
    assert all(parameter.grad is None for parameter in architecture.model.parameters())
    assert got.share is None and set(got.sizes) <= set(architecture.structure) and got.sizes
    assert got.methods == wanted.methods and got.strength == wanted.strength
    for trial in trials:
        sizes = {trial["axis"]: trial["size"]}
        assert trial["saved"] == count(architecture) - count(shrunk(architecture, sizes))
        assert math.isfinite(trial["loss"])
    tried = [(trial["axis"], trial["size"]) for trial in trials]
    assert len(set(tried)) == len(tried) and {axis for axis, _ in tried} == set(architecture.structure)
    assert seen[-1] == ("mix", len(trials), len(trials), "")
    again, others = find(architecture, wanted, TOKENS)
    assert again.sizes == got.sizes and others == trials
    total = count(architecture)
    shrink(architecture, got, TOKENS)
    assert share - SLACK <= (total - count(architecture)) / total <= 1.5 * share + SLACK


def test_the_trials_are_measured_on_windows_that_they_did_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = adapt(mamba())
    wanted = order(Recipe(pattern="structured", sparsity=0.2), architecture)
    looked, measured = [], []
    shrink_, losses_ = mixes.shrink, mixes.losses
    monkeypatch.setattr(
        mixes, "shrink", lambda a, o, tokens, **r: (looked.append(tokens), shrink_(a, o, tokens, **r))[1]
    )
    monkeypatch.setattr(mixes, "losses", lambda a, tokens: (measured.append(tokens), losses_(a, tokens))[1])
    find(architecture, wanted, TOKENS)
    rows = {tuple(row) for tokens in looked for row in tokens.tolist()}
    held = {tuple(row) for tokens in measured for row in tokens.tolist()}
    assert len(rows) == 6 and len(held) == 2 and not rows & held


def test_too_few_windows_are_refused() -> None:
    architecture = adapt(mamba())
    wanted = order(Recipe(pattern="structured", sparsity=0.2), architecture)
    with pytest.raises(ValueError, match="needs at least 2 calibration windows, got 1"):
        find(architecture, wanted, TOKENS[:1])


def test_an_impossible_share_is_refused_by_the_search() -> None:
    architecture = adapt(mamba())
    wanted = order(Recipe(pattern="structured", sparsity=0.97), architecture)
    with pytest.raises(ValueError, match="save 0.97 of the parameters; the nearest possible share is"):
        find(architecture, wanted, TOKENS)
