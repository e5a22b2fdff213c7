"""A tensor is made on the device of its input: whole runs on a second device (elsewhere.py) give what they
give on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import planned
import pytest
import torch
from elsewhere import DEVICE, Remote, elsewhere, moved
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from pico_hybrids import DISTINCT, pico_hybrid

from sparsessm import kernels
from sparsessm.architectures import MODEL_TYPES, InMemory, adapt, on_device
from sparsessm.architectures.on_device import OnDevice, chosen
from sparsessm.architectures.ranks import Alone
from sparsessm.calibration.journal import Forgetful
from sparsessm.calibration.walk import backwards, walk
from sparsessm.checkpoint.journal_lines import filled, plain
from sparsessm.evaluation.perplexity import measure, perplexity
from sparsessm.methods import allocation, entry_methods
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign
from sparsessm.studies import cells as study
from sparsessm.studies import windows

LENGTH = 6
TOKENS = torch.randint(0, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MODELS: Mapping[str, Callable[[], Any]] = {
    "mamba": pico_mamba,
    "falcon_mamba": pico_falcon_mamba,
    "mamba2": pico_mamba2,
    # Stock code groups tokens of experts by an operation that the CPU has for floats alone.
    **{name: partial(pico_hybrid, name, experts_implementation="eager") for name in DISTINCT},
}


@pytest.fixture(autouse=True)
def no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEVEL", "reference")  # another device has none either


def test_a_tensor_made_on_the_wrong_device_is_found() -> None:
    def shifted(x: torch.Tensor, device: Any = None) -> torch.Tensor:
        return x + torch.arange(len(x), device=device)

    with elsewhere():
        x = torch.ones(3, device=DEVICE)
        assert shifted(x, x.device).device == DEVICE and shifted(x, DEVICE).tolist() == [1, 2, 3]
        with pytest.raises(
            RuntimeError, match=r"aten\.add\.Tensor of tensors on two devices, lazy:0 and cpu"
        ):
            shifted(x)
        with pytest.raises(RuntimeError, match="two devices"):
            x[torch.arange(2)]
        with pytest.raises(TypeError, match="numpy cannot read"):
            x.numpy()
        assert isinstance(x, Remote) and not isinstance(x.to("cpu"), Remote)


def recipe(**asked: Any) -> Recipe:
    return Recipe(**asked).resolved(model="m", trained_length=LENGTH)


def assert_same_there(name: str, **asked: Any) -> None:
    """Pruning gives the same model, but for the order in which an einsum multiplies."""
    here = adapt(MODELS[name]())
    report = planned.prune(here, recipe(**asked), TOKENS)
    with elsewhere():
        there = adapt(moved(MODELS[name]()))
        again = planned.prune(there, recipe(**asked), TOKENS.to(DEVICE))
        assert [row.pruned for row in again.rows] == [row.pruned for row in report.rows]
        for tensor, want in zip(there.model.parameters(), here.model.parameters(), strict=True):
            assert tensor.device == DEVICE
            torch.testing.assert_close(tensor.to("cpu"), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", entry_methods())
def test_every_method(method: str) -> None:
    families = entry_methods()[method].families
    target = "all" if {"ssm", "projections"} <= set(families) else families[0]
    assert_same_there("mamba", method=method, target=target)
    if target == "ssm":
        assert_same_there("mamba2", method=method, target=target)


@pytest.mark.parametrize("asked", [
    {"target": "ssm", "pattern": "4:8", "method": "exact"},
    {"target": "ssm", "pattern": "4:8", "method": "sparsessm-vote"},
    {"target": "projections", "pattern": "2:4", "method": "sparsegpt", "ignore": ["dt_proj"]},
    {"target": "projections", "method": "sparsegpt", "allocation": "hessian-trace"},
    {"target": "projections", "method": "sparsegpt", "allocation": "owl"},
    {"target": "projections", "method": "sparsegpt", "allocation": "loss"},
    {"target": "projections", "method": "sparsegpt", "price": "norms"},
], ids=str)  # fmt: skip
def test_patterns_allocations_and_prices(asked: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "SAMPLE", 100)  # most matrices are thinned out
    assert_same_there("mamba", **asked)


@pytest.mark.parametrize(("name", "asked"), [
    ("mamba", {"pattern": "structured:state"}),
    ("mamba", {"pattern": "structured:state", "method": "random"}),
    ("mamba", {"pattern": "structured:state", "method": "magnitude"}),
    ("mamba", {"pattern": "structured:state", "method": "ghost"}),
    ("mamba", {"pattern": "structured:state", "method": "sparsessm-vote"}),
    ("mamba", {"pattern": "structured:channel"}),
    ("mamba", {"pattern": "structured:channel", "allocation": "loss"}),
    ("mamba", {"pattern": "structured:state=0.5,block=0.5", "method": "random"}),
    ("falcon_mamba", {"pattern": "structured:channel", "method": "magnitude"}),
    ("mamba2", {"pattern": "structured:state"}),
    ("mamba2", {"pattern": "structured:state", "method": "balanced"}),
    ("mamba2", {"pattern": "structured:head"}),
    ("mamba2", {"pattern": "structured:channel"}),
    ("mamba2", {"pattern": "structured:block"}),
    ("mamba2", {"pattern": "structured:block", "method": "cosine"}),
    ("mamba2", {"pattern": "structured:block", "method": "random"}),
    ("mamba", {"pattern": "structured", "method": "random"}),
], ids=str)  # fmt: skip
def test_whole_units(name: str, asked: Mapping[str, Any]) -> None:
    assert_same_there(name, **asked)


@pytest.mark.parametrize("name", DISTINCT)
def test_hybrids(name: str) -> None:
    assert_same_there(name, target="projections", method="wanda")
    if "state" in MODEL_TYPES[name].structure:
        assert_same_there(name, pattern="structured:state", method="random")
    else:
        assert_same_there(name, pattern="structured:block", method="random", sparsity=1 / 3)


def test_perplexity() -> None:
    want = perplexity(pico_mamba2(), TOKENS, n_bytes=100)
    with elsewhere():
        got = perplexity(moved(pico_mamba2()), TOKENS.to(DEVICE), n_bytes=100)
    assert got.window_nll == pytest.approx(want.window_nll, rel=1e-5)


def test_studies() -> None:
    """How many windows are enough, and what each matrix tolerates."""

    def asked(architecture: Any, tokens: torch.Tensor, held_out: torch.Tensor) -> list[float]:
        order = assign(recipe(method="absorb", target="projections"), architecture.targets)
        curve = windows.steps(architecture, order, tokens)
        found = [number for step in curve for number in (step.agreement, step.error)]
        rules = {name: replace(rule, repair="self") for name, rule in list(order.rules.items())[:3]}
        for cells in study.measure(architecture, rules, [0.5], tokens, held_out, set(), None):
            found += [cell.kl for cell in cells]
        return found

    tokens = torch.randint(0, 64, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    want = asked(adapt(pico_mamba()), tokens, TOKENS)
    with elsewhere():
        got = asked(adapt(moved(pico_mamba())), tokens.to(DEVICE), TOKENS.to(DEVICE))
    assert len(got) == 5 and got == pytest.approx(want, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("mamba", {}),
        ("mamba", {"bits": 4.0}),
        ("mamba", {"method": "sparsessm", "target": "ssm"}),
        ("mamba", {"target": "matrices"}),
        ("mamba", {"pattern": "structured:state"}),
        ("mamba", {"pattern": "structured", "sparsity": 0.2}),
        ("mamba2", {"pattern": "structured:state", "method": "balanced"}),
        ("mamba2", {"pattern": "structured:block"}),
        *((name, {}) for name in MODELS),
    ],
    ids=str,
)
def test_one_block_at_a_time_is_on_the_device(
    name: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model stays where it is; what a run makes of it is what it makes of a model that is all there."""
    with elsewhere():
        whole = adapt(moved(MODELS[name]()))
        report = planned.prune(whole, recipe(**asked), TOKENS.to(DEVICE))
        losses = measure(whole, TOKENS.to(DEVICE), 1).window_nll
        wanted = [tensor.to("cpu") for tensor in whole.model.parameters()]
    most: list[int] = []
    opened = OnDevice.open

    def watched(self: OnDevice, block: Any) -> None:
        opened(self, block)
        most.append(sum(other.device == DEVICE for other in (*there.blocks, there.tail)))

    monkeypatch.setattr(OnDevice, "open", watched)
    with elsewhere():
        there = adapt(MODELS[name](), residence=OnDevice(InMemory(), DEVICE))
        again = planned.prune(there, recipe(**asked), TOKENS)
        again_losses = measure(there, TOKENS, 1).window_nll
    assert [row.pruned for row in again.rows] == [row.pruned for row in report.rows]
    for tensor, want in zip(there.model.parameters(), wanted, strict=True):
        assert tensor.device.type == "cpu" and torch.equal(tensor, want)
    assert again_losses == losses
    for coded in again.levels.values():  # what a file is written of
        assert not any(isinstance(part, Remote) for part in (coded.rows, coded.columns))
        assert coded.levels().values().shape
    shared = name == "zamba2" or asked.get("target") == "matrices" or "bits" in asked
    assert max(most) <= 1 + shared, "what blocks share, a tied head too, is there with each of them"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("mamba", {"bits": 4.0}),
        ("mamba", {"grid": "int4:4"}),
        ("mamba", {"allocation": "loss"}),
        ("mamba2", {"pattern": "structured:state", "method": "balanced"}),
        ("mamba2", {"pattern": "structured", "sparsity": 0.2}),
    ],
    ids=str,
)
def test_what_a_journal_or_another_process_gives_comes_from_the_cpu(
    name: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_cpu(what: Any) -> Any:
        return filled(plain(what, tensors := []), {str(i): part for i, part in enumerate(tensors)})

    monkeypatch.setattr(Forgetful, "once", lambda self, name, make: on_the_cpu(make()))
    monkeypatch.setattr(Alone, "gathered", lambda self, value: [on_the_cpu(value)])
    with elsewhere():
        there = adapt(MODELS[name](), residence=OnDevice(InMemory(), DEVICE))
        report = planned.prune(there, recipe(**asked), TOKENS)
        assert report.rows and all(tensor.device.type == "cpu" for tensor in there.model.parameters())


def test_a_device_without_room_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_mamba()
    swapped, count = torch.utils.swap_tensors, [0]

    def failing(one: Any, other: Any) -> None:
        count[0] += 1
        if count[0] == 4:
            raise torch.OutOfMemoryError("no room")
        swapped(one, other)

    monkeypatch.setattr(torch.utils, "swap_tensors", failing)
    with elsewhere():
        there = adapt(model, residence=OnDevice(InMemory(), DEVICE))
        with pytest.raises(torch.OutOfMemoryError):
            measure(there, TOKENS, 1)
        assert all(tensor.device.type == "cpu" for tensor in model.parameters())
        assert measure(there, TOKENS, 1).windows == len(TOKENS)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("tpu", "device is 'tpu'; allowed: cpu, cuda, cuda:N, auto"),
        ("meta", "device is 'meta'; allowed"),
        ("cuda:x", "device is 'cuda:x'; allowed"),
        ("cuda", "device is 'cuda', but this PyTorch .* sees no GPU"),
        ("cuda:3", "device is 'cuda:3', but this PyTorch .* sees no GPU"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    asked: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen("auto", Alone()) == chosen("cpu", Alone()) == torch.device("cpu")
    with pytest.raises(ValueError, match=told):
        chosen(asked, Alone())


def test_processes_take_turns_in_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = Alone()
    found = []
    for number in range(3):
        ranks.local = number
        found.append([str(chosen(asked, ranks)) for asked in ("auto", "cuda", "cuda:1", "cpu")])
    assert [row[0] for row in found] == [row[1] for row in found] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {tuple(row[2:]) for row in found} == {("cuda:1", "cpu")}
    with pytest.raises(ValueError, match="device is 'cuda:2'; GPUs here: 2, from cuda:0 on"):
        chosen("cuda:2", ranks)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each parameter of a block that the walk had expected, whether its copy was used."""
    found: list[bool] = []
    take = on_device._Ahead.take

    def watched(self: Any, parameter: Any) -> Any:
        copy = take(self, parameter)
        found.append(copy is not None)
        return copy

    monkeypatch.setattr(on_device._Ahead, "take", watched)
    return found


def copying() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "sparsessm-ahead"]


def test_the_next_block_is_copied_while_one_computes(taken: list[bool]) -> None:
    with elsewhere():
        there = adapt(pico_mamba(num_hidden_layers=3), residence=OnDevice(InMemory(), DEVICE))
        assert [stop.block.index for stop in walk(there, TOKENS)] == [0, 1, 2]
        assert taken == [True] * sum(len(list(block.layer.parameters())) for block in there.blocks[1:])
        assert [stop.block.index for stop in backwards(there)] == [there.tail.index, 2, 1, 0]
    assert not copying()


def test_what_changes_after_it_was_copied_is_copied_again(taken: list[bool]) -> None:
    with elsewhere():
        there = adapt(pico_mamba(num_hidden_layers=3), residence=OnDevice(InMemory(), DEVICE))
        inside, values = (list(there.blocks[index].layer.parameters()) for index in (1, 2))
        for stop in walk(there, TOKENS):
            if stop.block.index == 0:
                with torch.no_grad():
                    inside[0] += 1
                wanted = inside[0].clone()
            if stop.block.index == 1:
                assert torch.equal(inside[0].to("cpu"), wanted)
                values[1].data = values[1] + 1  # a change that torch does not count
                wanted = values[1].clone()
            if stop.block.index == 2:
                assert torch.equal(values[1].to("cpu"), wanted)
    assert [place for place, used in enumerate(taken) if not used] == [0, len(inside) + 1]


@pytest.mark.parametrize("ending", ["left", "an error", "its last block"])
def test_no_thread_and_no_copy_outlive_a_walk(ending: str) -> None:
    with elsewhere():
        residence = OnDevice(InMemory(), DEVICE)
        there = adapt(pico_mamba(num_hidden_layers=3), residence=residence)
        going = walk(there, TOKENS)
        next(going)
        assert residence._ahead is not None
        if ending == "left":
            going.close()
        elif ending == "an error":
            with pytest.raises(ZeroDivisionError):
                going.throw(ZeroDivisionError())
        else:
            assert len(list(going)) == 2
    assert residence._ahead is None and not copying()


def test_a_block_for_which_memory_is_scarce_is_copied_when_it_is_opened(taken: list[bool]) -> None:
    with elsewhere():
        there = adapt(pico_mamba(num_hidden_layers=3), residence=OnDevice(InMemory(memory=1 << 10), DEVICE))
        found = measure(there, TOKENS, 1)
        assert not taken
        there = adapt(there.model, residence=OnDevice(InMemory(), DEVICE))
        assert measure(there, TOKENS, 1) == found and all(taken)
