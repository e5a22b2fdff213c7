"""One place opens and closes blocks, whatever walks; several streams are what single ones are; a stop that
the walk has left is of no use any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pico import pico_mamba, pico_mamba2
from pico_hybrids import pico_hybrid
from planned import prune
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm.architectures import Architecture, Target, adapt
from sparsessm.calibration import walk as walking
from sparsessm.calibration.journal import Stream
from sparsessm.calibration.loss import head_losses, losses
from sparsessm.calibration.prices import output_fisher, output_norms
from sparsessm.calibration.progress import Steps
from sparsessm.calibration.slabs import first_tokens, grouped
from sparsessm.calibration.visit import survey, visit
from sparsessm.calibration.walk import backwards, final, walk
from sparsessm.evaluation.perplexity import perplexity
from sparsessm.methods.observers import InputGram, InputNorm
from sparsessm.pruning.blocks import _each_alone, _loss_without, chosen_blocks
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign
from sparsessm.recipe.sizes import order
from sparsessm.studies import cells

TOKENS = torch.randint(0, 64, (5, 21), generator=torch.Generator().manual_seed(0))


class Doors:
    """What was opened and closed, by the index of the block, in this order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[int] = []
        self.closed: list[int] = []
        opened = walking.opened

        @contextmanager
        def counted(block: Any, *rest: Any) -> Iterator[Any]:
            self.opened.append(block.index)
            try:
                with opened(block, *rest) as stop:
                    yield stop
            finally:
                self.closed.append(block.index)

        monkeypatch.setattr(walking, "opened", counted)

    def assert_each(self, times: int, among: range, closed: bool = True) -> None:
        assert sorted(self.opened) == sorted([*among] * times)
        if closed:  # one after the other: no block is open beside another
            assert self.opened == self.closed


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Doors:
    return Doors(monkeypatch)


def pruned(architecture: Architecture, **fields: Any) -> None:
    asked = Recipe(**fields).resolved(model="m", trained_length=21)
    prune(architecture, asked, TOKENS)


# --- one place ---

PLAIN = {"sparsity": 0.5, "price": "none", "allocation": "uniform"}
WALKS: dict[str, Callable[[Architecture], Any]] = {
    "prune": lambda a: pruned(a, target="projections", **PLAIN),
    "prune, with no data": lambda a: pruned(a, method="magnitude", sparsity=0.5),
    "units": lambda a: pruned(a, pattern="structured:channel", sparsity=0.5, price="none"),
    "block choice": lambda a: _loss_without(a, TOKENS, []),
    "survey": lambda a: list(survey(a, TOKENS, lambda t: InputNorm() if t.kind == "x_proj" else None)),
    "norms": output_norms,
    "perplexity": lambda a: perplexity(a.model, TOKENS, 100),
}
BEHIND = {"prune, with no data", "block choice", "perplexity"}  # that go to the head


@pytest.mark.parametrize("what", WALKS)
def test_every_block_is_opened_once(what: str, doors: Doors) -> None:
    WALKS[what](adapt(pico_mamba(num_hidden_layers=3)))
    doors.assert_each(1, range(3 + (what in BEHIND)))
    assert doors.opened == sorted(doors.opened)


def test_a_backward_pass_opens_them_on_the_way_there_and_on_the_way_back(doors: Doors) -> None:
    output_fisher(adapt(pico_mamba(num_hidden_layers=3)), TOKENS)
    assert doors.opened == doors.closed == [0, 1, 2, 3, 3, 2, 1, 0]


def test_blocks_are_compared_in_one_walk(doors: Doors) -> None:
    """By how little they turn the stream: once; by the loss without them: once for all of them alone."""
    for method in ("cosine", "exact"):
        architecture = adapt(pico_mamba(num_hidden_layers=4))
        wanted = order(Recipe(pattern="structured:block", sparsity=0.25, method=method), architecture)
        doors.opened.clear(), doors.closed.clear()
        chosen_blocks(architecture, wanted, TOKENS, None)
        assert doors.opened == doors.closed == ([0, 1, 2, 3] if method == "cosine" else [0, 1, 2, 3, 4])


@pytest.mark.parametrize("what", ["prune", "units", "survey", "norms"])
def test_a_block_is_closed_where_the_work_at_it_fails(
    what: str, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico_mamba(num_hidden_layers=3)
    architecture = adapt(model)

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no more")

    if what == "norms":
        monkeypatch.setattr("sparsessm.calibration.prices.block_norms", fail)
    else:
        monkeypatch.setattr(architecture.blocks[1], "forward", fail)
    with pytest.raises(ValueError, match="no more"):
        WALKS[what](architecture)
    assert doors.opened == doors.closed == ([0] if what == "norms" else [0, 1])


def test_a_block_is_closed_where_the_caller_goes(doors: Doors) -> None:
    architecture = adapt(pico_mamba())
    for stop in walk(architecture, TOKENS):
        assert (stop.block.index, doors.opened, doors.closed) == (0, [0], [])
        break
    assert doors.closed == [0]
    with pytest.raises(ZeroDivisionError):
        for _ in visit(architecture, ["backbone.layers.0.mixer.A_log"], lambda _: None, TOKENS):
            raise ZeroDivisionError
    assert doors.opened == doors.closed == [0, 0]


def test_only_blocks_that_stay_are_opened_unless_the_dense_model_runs(doors: Doors) -> None:
    architecture = adapt(pico_mamba(num_hidden_layers=4))
    assert [stop.block.index for stop in walk(architecture, TOKENS, without=[1, 3])] == [0, 2]
    assert doors.opened == [0, 2]
    dense = Stream("dense", [walking.embedded(architecture, TOKENS)])
    assert [s.block.index for s in walk(architecture, TOKENS, dense=dense, without=[1, 3])] == [0, 2]
    assert doors.opened[2:] == doors.closed[2:] == [0, 1, 2]


# --- streams ---


@pytest.mark.parametrize("make", [pico_mamba, pico_mamba2, lambda: pico_hybrid("jamba")])
def test_several_streams_are_what_single_ones_are(make: Callable[[], nn.Module]) -> None:
    architecture = adapt(make())
    groups = TOKENS[:2], TOKENS[2:], TOKENS[:1].flip(1)
    together = final(architecture, *groups)
    assert all(torch.equal(one, *final(architecture, g)) for one, g in zip(together, groups, strict=True))
    want = torch.cat([losses(architecture, group) for group in groups])
    assert torch.equal(losses(architecture, *groups), want)

    def halved(target: Target) -> Tensor:
        return target.matrix.masked_fill(torch.arange(target.matrix.shape[1]) % 2 == 0, 0.0)

    def looks(beside: bool) -> list[Tensor]:
        architecture, found = adapt(make()), []
        dense = Stream("dense", [walking.embedded(architecture, TOKENS)])
        for stop in walk(architecture, TOKENS, *(groups if beside else ()), dense=dense):
            target = stop.block.targets[-1]
            seen = stop.look(target, InputGram(paired=True))
            found += [seen.gram, seen.cross]
            target.replace(halved(target))
        return found

    alone, beside = looks(False), looks(True)
    assert len(alone) == 2 * len(architecture.blocks)
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


def test_losses_are_those_of_the_stock_model() -> None:
    model = pico_mamba(num_hidden_layers=3)
    with torch.no_grad():
        logits = model(TOKENS).logits.double()
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    want = nats.view(len(TOKENS), -1).mean(1)
    architecture = adapt(model)
    found = head_losses(architecture, *final(architecture, TOKENS), TOKENS)
    for got in (losses(architecture, *grouped(TOKENS, 42)), found):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("group", [21, 42, 1000])
def test_streams_without_a_block_are_those_of_a_model_without_it(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsessm.pruning.blocks.GROUP", group)
    architecture = adapt(pico_mamba(num_hidden_layers=4))
    whole, alone = _each_alone(architecture, TOKENS)
    assert whole == pytest.approx(_loss_without(architecture, TOKENS, []), rel=1e-7)
    for index, loss in alone.items():
        smaller = adapt(pico_mamba(num_hidden_layers=4))
        smaller.drop(index)
        assert loss == pytest.approx(_loss_without(smaller, TOKENS, []), rel=1e-7)
        assert loss == pytest.approx(_loss_without(architecture, TOKENS, [index]), rel=1e-7)
    assert len({whole, *alone.values()}) == 5


def test_a_walk_behind_a_stop_goes_on_from_there() -> None:
    architecture = adapt(pico_mamba(num_hidden_layers=3))
    (want,) = final(architecture, TOKENS)
    for stop in walk(architecture, None, TOKENS, tail=True):
        states = [stop.groups[0].clone()]
        if stop.block is not architecture.tail:
            states = [walking.through(stop.block, states[0])]
            for later in stop.behind(*states):
                states = later.groups
                assert later.block.index > stop.block.index
        assert torch.equal(states[0], want)


def test_backwards_is_from_the_tail_to_the_first() -> None:
    architecture = adapt(pico_mamba(num_hidden_layers=3))
    assert [stop.block for stop in backwards(architecture)] == [architecture.tail, *architecture.blocks[::-1]]


def test_what_observers_of_two_models_see_where_there_is_one() -> None:
    for stop in walk(adapt(pico_mamba()), TOKENS, tail=True):
        target = stop.block.targets[0]
        seen = stop.look(target, InputGram(paired=True))
        assert torch.equal(seen.cross, seen.gram)
        assert torch.equal(seen.gram, stop.look(target, InputGram()).gram)


def test_a_shared_matrix_is_looked_at_in_all_its_uses() -> None:
    """As a survey sees it, which stops at each use."""
    name = "zamba2-two-blocks"
    architecture = adapt(pico_hybrid(name))
    shared = {t.name: t for t in architecture.targets if t.uses}
    surveyed = dict(
        (target.name, seen)
        for target, seen in survey(architecture, TOKENS, lambda t: InputGram() if t.name in shared else None)
    )
    assert shared and surveyed.keys() == shared.keys()
    for stop in walk(architecture, TOKENS):
        before = stop.hidden.clone()
        for target in stop.block.targets:
            if target.name in shared:
                seen = stop.look(target, InputGram(paired=True))
                assert seen.tokens == len(shared[target.name].uses) * TOKENS.numel()
                assert torch.equal(seen.gram, surveyed[target.name].gram)
                assert torch.equal(seen.gram, seen.cross)
        assert torch.equal(stop.hidden, before)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_few_rows_at_once_see_the_same(rows: int) -> None:
    for one, other in zip(walk(adapt(pico_mamba()), TOKENS), walk(adapt(pico_mamba()), TOKENS), strict=True):
        target, some = one.block.targets[0], InputGram()
        one.run({target.kind: some}, until=target.kind, rows=rows)
        want = other.look(target, InputGram()).gram
        torch.testing.assert_close(
            one.result(some).gram, want, rtol=1e-5, atol=1e-6 * float(want.abs().max())
        )


# --- a stop ---


def test_a_stop_that_the_walk_has_left_is_closed() -> None:
    stops = walk(adapt(pico_mamba()), TOKENS)
    left = next(stops)
    target = left.block.targets[0]
    next(stops)
    again = left.block
    for use in (
        left.advance,
        left.drop_windows,
        left.behind,
        lambda: left.look(target, InputGram()),
        lambda: left.replace(again),
    ):
        with pytest.raises(RuntimeError, match=r"backbone\.layers\.0: the walk has gone on"):
            use()


def test_windows_go_through_a_block_once() -> None:
    architecture = adapt(pico_mamba())
    (want,) = final(architecture, TOKENS)
    for stop in walk(architecture, TOKENS, TOKENS):
        stop.run({})
        with pytest.raises(RuntimeError, match="once"):
            stop.run({})
        stop.advance(), stop.advance()
    torch.testing.assert_close(stop.groups[0], want)


def test_windows_that_nobody_needs_are_dropped(doors: Doors) -> None:
    for stop in walk(adapt(pico_mamba()), TOKENS, TOKENS, tail=True):
        if stop.block.index == 0:
            stop.drop_windows()
        else:
            assert not stop.groups
            with pytest.raises(ValueError, match="the walk carries no windows"):
                stop.look(stop.block.targets[0], InputGram())
    assert doors.opened == [0, 1, 2]


def test_another_block_can_take_the_place(doors: Doors) -> None:
    """The windows go through the new one."""
    architecture = adapt(pico_mamba())
    (want,) = final(adapt(pico_mamba()), TOKENS)
    other = architecture.blocks[0].copy()
    for target in other.targets:
        if target.kind == "out_proj":
            target.replace(torch.zeros_like(target.matrix))
    for stop in walk(architecture, None, TOKENS, tail=True):
        if stop.block.index == 0:
            entering = stop.groups[0]
            stop.replace(other)
            assert stop.block is other
        elif stop.block.index == 1:
            assert torch.equal(stop.groups[0], entering)
        else:
            assert not torch.allclose(stop.groups[0], want)


# --- what is counted ---


def test_steps_end_at_their_total() -> None:
    told: list[tuple[str, int, int, str]] = []
    steps = Steps("stage", 5, lambda *call: told.append(call))
    for count in (1, 3, 4, 1):
        steps.at(count)  # of how many is not known
        steps(count)
    assert told == [("stage", 1, 5, ""), ("stage", 4, 5, ""), ("stage", 5, 5, "")]
    Steps("stage", 5, None)()


def test_steps_say_where_the_work_is() -> None:
    told: list[tuple[str, int, int, str]] = []
    steps = Steps("stage", 2, lambda *call: told.append(call), blocks=2)
    for block in range(3):
        steps.at(block)
        steps()
    first, second, head = "block 1 of 2", "block 2 of 2", "head"
    assert [(done, place) for _, done, _, place in told] == [
        *((0, first), (1, first), (1, second), (2, second), (2, head))
    ]


@pytest.mark.parametrize("most,first,groups", [(1, 1, 5), (41, 1, 5), (42, 2, 3), (104, 4, 2), (10**6, 5, 1)])
def test_windows_are_counted_in_tokens(most: int, first: int, groups: int) -> None:
    assert torch.equal(first_tokens(TOKENS, most), TOKENS[:first])
    assert torch.equal(first_tokens(TOKENS, most, least=3), TOKENS[: max(first, 3)])
    found = grouped(TOKENS, most)
    assert len(found) == groups and torch.equal(torch.cat(found), TOKENS)


def test_variants_of_a_block_go_through_the_rest_together(doors: Doors) -> None:
    """A walk over calibration and held-out windows, and behind each matrix one over all its variants."""
    architecture = adapt(pico_mamba(num_hidden_layers=3))
    recipe = Recipe(target="projections", **PLAIN, repair="self").resolved(model="m", trained_length=21)
    rules = {
        name: rule
        for name, rule in assign(recipe, architecture.targets).rules.items()
        if name.endswith("out_proj.weight")
    }
    found = [*cells.measure(architecture, rules, [0.3, 0.6], TOKENS, TOKENS[:2])]
    assert [len(one) for one in found] == [2, 2, 2]
    assert doors.opened == [0, 1, 2, 0, 1, 2, 3, 1, 2, 3, 2, 3]
