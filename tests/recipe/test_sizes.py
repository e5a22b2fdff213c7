"""recipe/sizes.py: sizes that transformers can express, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2

from sparsessm.architectures import Architecture, adapt
from sparsessm.methods import unit_methods
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.sizes import Order, order, possible, size_for, size_of

UNITS = unit_methods()

MAMBA = adapt(pico_mamba())
FALCON = adapt(pico_falcon_mamba())
WIDE = adapt(pico_mamba(hidden_size=40))  # 80 channels
MAMBA2 = adapt(pico_mamba2(num_heads=8, expand=4, n_groups=2))  # 8 heads x 8 in a stream of 16
LONG = adapt(pico_mamba2(num_heads=4, head_dim=64, expand=16))  # heads of 64 channels
TIGHT = adapt(pico_mamba2(num_heads=2, head_dim=8, expand=1, n_groups=1))  # inner = hidden: no less


def ordered(architecture: Architecture, **recipe: Any) -> Order:
    return order(Recipe(**recipe), architecture)


def test_sizes_now() -> None:
    assert [size_of(MAMBA, axis) for axis in MAMBA.structure] == [8, 32, 2]
    assert [size_of(MAMBA2, axis) for axis in MAMBA2.structure] == [8, 4, 8, 2]  # heads of each group


def test_what_stock_code_has_a_word_for() -> None:
    assert possible(MAMBA, "state") == list(range(1, 8)) and possible(MAMBA, "block") == [1]
    assert possible(MAMBA, "channel") == [16], "multiples of 16 where there are 32 or more"
    assert possible(WIDE, "channel") == [16, 32, 48, 64]
    small = adapt(pico_mamba(hidden_size=12))
    assert possible(small, "channel") == list(range(1, 24)), "any number where there are few"
    # heads x channels must be 16 times a whole number
    assert possible(MAMBA2, "head") == [1, 2, 3] and possible(MAMBA2, "channel") == [2, 4, 6]
    assert possible(LONG, "channel") == [16, 32, 48]
    assert possible(TIGHT, "head") == possible(TIGHT, "channel") == []


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0.001, 0.999), which=st.integers(0, 8))
def test_the_size_is_the_nearest_there_is_or_none(share: float, which: int) -> None:
    pairs = [(a, axis) for a in (MAMBA, WIDE, MAMBA2) for axis in ("state", "channel", "block")]
    architecture, axis = pairs[which]
    now, sizes = size_of(architecture, axis), possible(architecture, axis)
    wanted = (1 - share) * now
    try:
        size = size_for(architecture, axis, share)
    except ValueError as error:
        assert f"sparsity {share:g} of axis '{axis}'" in str(error) and f" of {now}" in str(error)
        assert min(abs(size - wanted) for size in sizes) > 0.5
        assert all(f"{1 - size / now:.3g}" in str(error) for size in sizes)
        return
    assert size in sizes and abs(size - wanted) == min(abs(other - wanted) for other in sizes)
    assert abs(size - wanted) <= max(8 if axis == "channel" and now >= 32 else 0.5, 0.05 * now)


@pytest.mark.parametrize(
    ("architecture", "pattern", "sparsity", "words"),
    [
        (MAMBA, "structured:head", 0.5,
         "pattern 'structured:head': a Mamba model does not support it; supported axes: "
         "state, channel, block"),
        (FALCON, "structured:head", 0.5,
         "a FalconMamba model does not support it; supported axes: state, channel, block"),
        (MAMBA, "structured:state", 0.99, "sparsity 0.99 of axis 'state': transformers cannot express "
         "0.99 of 8 units; possible shares: 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875"),
        (MAMBA, "structured:channel", 0.05,
         "of axis 'channel': .* of 32 units; possible shares: 0.5$"),
        (MAMBA, "structured:block", 0.9, "of axis 'block': .* of 2 units; possible shares: 0.5$"),
        (MAMBA2, "structured:head", 0.9, "of axis 'head': .* of 4 units; possible shares: 0.25, 0.5, 0.75$"),
        (TIGHT, "structured:head", 0.5, "of axis 'head': .* of 2 units; possible shares: none"),
    ],
)  # fmt: skip
def test_what_is_impossible_lists_what_is_possible(
    architecture: Architecture, pattern: str, sparsity: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        ordered(architecture, pattern=pattern, sparsity=sparsity)
    assert "\n" not in str(caught.value)


def test_sizes_that_stock_code_has_no_word_for_together() -> None:
    """Each alone is fine: 4 heads of 8, and 8 heads of 2; together 8 channels in a stream of 16."""
    with pytest.raises(
        ValueError, match="pattern 'structured:head=0.5,channel=0.75': stock Mamba-2 cannot have 8 channels"
    ):
        ordered(MAMBA2, pattern="structured:head=0.5,channel=0.75")
    assert ordered(MAMBA2, pattern="structured:head=0.5,channel=0.5").sizes == {"head": 2, "channel": 4}


@pytest.mark.parametrize("axis", ["state", "channel", "head", "block"])
@pytest.mark.parametrize("method", list(UNITS))
def test_a_method_that_does_not_choose_units_of_the_axis(method: str, axis: str) -> None:
    how = {"pattern": f"structured:{axis}", "method": method}
    if UNITS[method].projects and axis != "state":
        with pytest.raises(ValueError, match=f"'{method}' needs the pattern structured:state"):
            ordered(MAMBA2, **how)
    elif axis not in UNITS[method].axes:
        with pytest.raises(ValueError, match=f"'{method}' does not support axis '{axis}'") as caught:
            ordered(MAMBA2, **how)
        listed = str(caught.value).partition("these do: ")[2].split(", ")
        assert listed == [name for name, row in UNITS.items() if axis in row.axes]
    elif method == "sparsessm-vote":
        with pytest.raises(ValueError, match="'sparsessm-vote' needs one decay for each state; only Mamba-1"):
            ordered(MAMBA2, **how)
        assert ordered(MAMBA, **how).names == ["sparsessm-vote"]
    else:
        assert ordered(MAMBA2, **how).methods == {axis: UNITS[method]}


def test_a_method_must_fit_every_axis_of_a_mix() -> None:
    with pytest.raises(ValueError, match="'ghost' does not support axis 'channel'"):
        ordered(MAMBA, pattern="structured:state=0.5,channel=0.5", method="ghost")
    with pytest.raises(ValueError, match="'magnitude' does not support axis 'block'"):
        ordered(MAMBA, pattern="structured", method="magnitude")


def test_what_a_recipe_says_of_repair_weight_and_seed() -> None:
    plain = ordered(MAMBA, pattern="structured:state")
    assert (plain.strength, plain.priced, plain.seed, plain.share) == (1.0, True, 0, None)
    assert plain.sizes == {"state": 4} and plain.looks and plain.names == ["exact"]
    other = ordered(MAMBA, pattern="structured:state", repair="none", price="none", seed=7, method="random")
    assert (other.strength, other.priced, other.seed, other.looks) == (0.0, False, 7, False)
    assert ordered(MAMBA, pattern="structured:state", repair="dense-target:0.25").strength == 0.25
    for repair in ("dense-target:0.25", None):
        assert ordered(MAMBA, pattern="structured:state", method="random", repair=repair).looks
    for method in ("exact", "ghost", "sparsessm-vote"):
        assert ordered(MAMBA, pattern="structured:state", method=method, repair="none").looks


def test_a_share_of_all_parameters_is_still_to_be_found() -> None:
    mixed = ordered(MAMBA2, pattern="structured", sparsity=0.3)
    assert mixed.share == 0.3 and mixed.sizes == {} and mixed.looks
    assert list(mixed.methods) == ["state", "channel", "head", "block"]
    assert ordered(MAMBA, pattern="structured").share == 0.5
    assert list(ordered(MAMBA, pattern="structured").methods) == ["state", "channel", "block"]
    assert mixed.names == ["exact"]


def test_shares_of_several_axes() -> None:
    mixed = ordered(MAMBA, pattern="structured:block=0.5,state=0.25")
    assert mixed.sizes == {"block": 1, "state": 6} and mixed.share is None


def test_which_recipes_are_structured() -> None:
    assert Recipe(pattern="structured").takes_units and Recipe(pattern="structured:state").takes_units
    assert not Recipe().takes_units and not Recipe(pattern="2:4").takes_units


def test_a_model_without_an_axis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = adapt(pico_mamba())
    monkeypatch.setattr(type(architecture), "structure", ())
    with pytest.raises(
        ValueError, match="pattern 'structured': a Mamba model has no units that can be removed"
    ):
        ordered(architecture, pattern="structured")
    with pytest.raises(ValueError, match="does not support it; supported axes: none"):
        ordered(architecture, pattern="structured:state")


@settings(deadline=None, max_examples=30)
@given(
    hidden=st.integers(1, 6),
    expand=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 3, 4, 6]),
    groups=st.integers(1, 3),
)
def test_every_size_said_possible_makes_a_stock_model(
    hidden: int, expand: int, heads: int, groups: int
) -> None:
    hidden *= heads  # so that heads divide the channels
    if heads % groups:
        groups = 1
    model = pico_mamba2(
        hidden_size=hidden, expand=expand, num_heads=heads, head_dim=hidden * expand // heads, n_groups=groups
    )
    architecture = adapt(model)
    for axis in ("head", "channel", "state"):
        sizes = architecture.sizes(axis)
        for size in sizes:
            fields = architecture.fields({axis: size})
            config = {**model.config.to_dict(), **fields}
            made = type(model.config).from_dict(config)  # refuses what does not fit together
            assert made.num_heads * made.head_dim == made.hidden_size * made.expand
            left = {"head": heads // groups, "channel": hidden * expand // heads, "state": 8} | {axis: size}
            assert made.num_heads == left["head"] * groups and made.head_dim == left["channel"]
            assert made.state_size == left["state"]
        for size in set(range(1, size_of(architecture, axis))) - set(sizes):
            heads_left = size * groups if axis == "head" else heads
            channels = size if axis == "channel" else hidden * expand // heads
            assert heads_left * channels % hidden, "what is left out does not fit"


def test_looking_for_sizes_changes_nothing() -> None:
    model = pico_mamba2()
    before = model.config.to_dict(), [tensor.clone() for tensor in model.state_dict().values()]
    ordered(adapt(model), pattern="structured:state=0.5,head=0.5")
    assert model.config.to_dict() == before[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[1], strict=True))
