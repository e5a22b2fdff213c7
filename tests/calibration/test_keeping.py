"""Looks that go on from what looks before them computed: the same bits whatever fits, and less work."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba
from planned import prune
from torch import Tensor
from whereabouts import MODELS as STOCK

from sparsessm import kernels
from sparsessm.architectures import Architecture, InMemory, adapt
from sparsessm.architectures.kept import Kept, Room
from sparsessm.calibration import passing, slabs
from sparsessm.calibration import visit as visiting
from sparsessm.calibration.visit import visit
from sparsessm.calibration.walk import walk
from sparsessm.methods.observers import InputGram
from sparsessm.recipe.recipe import Recipe

MODELS: dict[str, Callable[..., Any]] = dict(STOCK)
TOKENS = torch.randint(0, 64, (5, 50), generator=torch.Generator().manual_seed(0))
FEW = TOKENS[:, :22]
PLENTY = 1 << 32
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"method": "sparsegpt", "target": "projections"},
    {
        "rules": [
            {"targets": ["conv1d"]},
            {"targets": ["projections"], "method": "wanda"},
            {"targets": ["head"]},
        ]
    },
    {"rules": [{"targets": ["projections"], "method": "magnitude"}, {"targets": ["ssm"]}]},
)

# Every architecture with what is asked for by default, in both precisions. Whatever else is asked for ends in
# the same mixers: of Mamba-1 and of Mamba-2, alone and in a hybrid (with experts, with a block used twice).
CASES = [(model, RUNS[0], compute) for model in MODELS for compute in ("float32", "bfloat16")]
CASES += [
    (model, fields, "bfloat16")
    for model in ("mamba", "mamba2", "jamba", "zamba2")
    for fields in RUNS[1:]
    if model in MODELS
]


def run(
    model: str, memory: int, compute: str = "float32", tokens: Tensor = TOKENS, **fields: Any
) -> tuple[dict[str, Tensor], list[Any], Any]:
    """The weights and the report's rows after a run with so much memory."""
    architecture = adapt(MODELS[model](), residence=InMemory(memory), compute=compute)
    fields = {"sparsity": 0.5, "price": "none", "allocation": "uniform", **fields}
    report = prune(architecture, Recipe(**fields).resolved(model="m", trained_length=50), tokens)
    return architecture.model.state_dict(), report.rows, architecture


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    weights, rows = one[:2]
    return (
        weights.keys() == other[0].keys()
        and rows == other[1]
        and all(torch.equal(tensor, other[0][name]) for name, tensor in weights.items())
    )


@pytest.mark.parametrize(("model", "fields", "compute"), CASES, ids=str)
def test_results_have_the_same_bits_whatever_fits(
    model: str, fields: dict[str, Any], compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "ROWS", 35)  # 7 tokens a slab, the last of 1
    plain = run(model, 0, compute, FEW, **fields)
    for memory in (PLENTY, 130_000, 22_000):  # all, and ever fewer slabs of ever fewer stages
        assert same(plain, run(model, memory, compute, FEW, **fields)), memory


@pytest.mark.parametrize("model", MODELS)
def test_a_walk_that_keeps_nothing_sees_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "ROWS", 35)
    kept = run(model, PLENTY)
    monkeypatch.setattr(visiting, "walk", lambda *a, keeping, **how: walk(*a, **how))
    weights, rows, _ = run(model, PLENTY)
    assert [row.pruned for row in rows] == [row.pruned for row in kept[1]]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, kept[0][name], rtol=1e-3, atol=1e-4)


def test_a_block_computes_every_stage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions and scans: one for each stream and slab, and those of A_log before it is final."""
    calls = {"causal_conv1d": 0, "selective_scan": 0, "selective_scan_stats": 0}

    def counting(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **how: Any) -> Any:
            calls[name] += 1
            return whole(*args, **how)

        return counted

    for name in calls:
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    model = {"num_hidden_layers": 1}
    monkeypatch.setitem(MODELS, "one", lambda: pico_mamba(**model))
    run("one", PLENTY)  # one slab
    last = dict(calls)
    model["num_hidden_layers"] = 2
    calls |= dict.fromkeys(calls, 0)
    run("one", PLENTY)
    assert last == {"causal_conv1d": 2, "selective_scan": 2, "selective_scan_stats": 1}
    assert calls == {name: 2 * count for name, count in last.items()}, "the pass that goes on adds none"


def test_what_is_kept_stays_in_its_room_and_goes_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "ROWS", 35)
    rooms: list[Room] = []
    keepers: list[weakref.ref[Kept]] = []
    least: list[int] = []

    class Watched(Kept):  # type: ignore[misc]
        def __init__(self, room: Room) -> None:
            super().__init__(room)
            keepers.append(weakref.ref(self))
            rooms.append(room)

        def at(self, slab: int) -> None:
            least.append(self._room.left)
            super().at(slab)

    monkeypatch.setattr(passing, "Kept", Watched)
    seen = 0
    architecture = adapt(pico_mamba(num_hidden_layers=3), residence=InMemory(400_000))
    for (target,), look in visit(architecture, _projections(architecture), _watch, TOKENS, paired=True):
        look({target.name: 0})
        gc.collect()
        alive = [keeper for keeper in keepers if keeper() is not None]
        assert len(alive) == 4, "those of this block: two lanes in two models"
        seen += 1
    gc.collect()
    assert seen == 12 and not any(keeper() is not None for keeper in keepers)
    assert 0 <= min(least) < 50_000 and max(least) == 100_000
    assert all(room.left == 100_000 for room in rooms[:8]), "all was handed back before the block was closed"


def _projections(architecture: Architecture) -> set[str]:
    return {target.name for target in architecture.targets if target.family == "projections"}


def _watch(target: Any) -> InputGram | None:
    return InputGram(paired=True) if target.family == "projections" else None


def test_an_earlier_look_again_sees_what_is_there_now() -> None:
    """Not what was kept for a later one."""
    architecture = adapt(pico_mamba(num_hidden_layers=1), residence=InMemory(PLENTY))
    for stop in walk(architecture, TOKENS, keeping=True):
        target = stop.block.target("x_proj")
        stop.look(stop.block.target("out_proj"), InputGram())
        before = stop.look(target, InputGram()).gram
        stop.block.target("conv1d").replace(torch.zeros_like(stop.block.target("conv1d").matrix))
        # conv1d comes before x_proj: whoever keeps may not change it any more, but a look at it forgets
        stop.look(stop.block.target("conv1d"), InputGram())
        assert not torch.equal(before, stop.look(target, InputGram()).gram)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 400),
)
def test_stages_in_a_chain_are_what_they_are_without(
    passes: list[tuple[int, bool]], slabs: int, room: int
) -> None:
    """Any passes over stages 1 to 4 of a recurrence each, whose weights change behind what is final."""
    weights = [1, 1, 1, 1]
    purse = Room(room)
    kept = Kept(purse)

    def through(once: Callable[[str, Callable[[], Any]], Any], depth: int) -> list[int]:
        state: Any = None  # of all stages, the innermost first
        found = []
        for slab in range(slabs):
            kept.at(slab)

            def stage(number: int, slab: int = slab, before: Any = state) -> tuple[Tensor, Any]:
                def make() -> tuple[Tensor, Any]:
                    x, inner = stage(number - 1) if number else (torch.tensor([slab + 1]), ())
                    own = (before[number] if before else 0) + int(x[0]) * weights[number]
                    return torch.tensor([own] * (4 - number)), (*(inner or (None,) * number), own)

                return once(str(number), make)

            result, state = stage(depth - 1)
            found.append(int(result[0]))
        return found

    reached = 0
    for depth, change in sorted(passes):
        kept.begin([str(number) for number in range(depth - 1)], last=False)
        got = through(kept.once, depth)
        assert got == through(lambda _, make: make(), depth)
        assert 0 <= purse.left <= room
        if change:
            weights[depth - 1] += depth
        reached = depth
    kept.begin([str(number) for number in range(reached)], last=True)
    assert through(kept.once, reached) == through(lambda _, make: make(), reached)
    kept.begin((), last=True)
    assert purse.left == room
