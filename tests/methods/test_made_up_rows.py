"""A method, of entries or of units, and an allocation are rows: a made-up one runs from the command line, and
no other file is touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import FAST, refused, run
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsessm.methods import METHODS, EntryMethod, Method, Rule, UnitMethod
from sparsessm.methods.allocation import ALLOCATIONS
from sparsessm.methods.base import Allocation, Member
from sparsessm.methods.observers import InputNorm
from sparsessm.methods.structured import Units

PLACE = "backbone.layers.{}.mixer.{}.weight"


@pytest.fixture
def dense(here: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(here / "dense")


def prune(*options: str) -> dict[str, Any]:
    """The record of a run from the command line, saved to "out"."""
    line = ["prune", "dense", "-o", "out", *FAST, "--no-eval", "--json", "--quiet"]
    return json.loads(run(*line, *options).stdout)


def last_columns(weight: Tensor, seen: Any, rule: Rule, columns: slice) -> Tensor:
    return -torch.arange(weight.shape[1], dtype=torch.float64)[columns].expand(len(weight), -1)


def test_a_made_up_method_for_entries(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = EntryMethod(
        "from-the-right", "made up", "the last columns go", ("projections",), None, last_columns
    )
    monkeypatch.setitem(METHODS, row.name, Method(row))
    record = prune("--method", row.name, "--target", "projections", "--sparsity", "0.25")
    assert {target["method"] for target in record["targets"]} == {row.name}
    got = AutoModelForCausalLM.from_pretrained("out").state_dict()
    for layer in range(2):
        was = dense.state_dict()[PLACE.format(layer, "in_proj")]
        stays = was.shape[1] * 3 // 4
        assert torch.equal(got[PLACE.format(layer, "in_proj")][:, :stays], was[:, :stays])
        assert not got[PLACE.format(layer, "in_proj")][:, stays:].any()


def last_units(units: Units) -> Sequence[Tensor]:
    return [-torch.arange(size, dtype=torch.float64) for size in units.sizes]


def test_a_made_up_method_for_units(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = UnitMethod("last-units", "made up", "the last units go", ("state", "channel"), {}, last_units)
    monkeypatch.setitem(METHODS, row.name, Method(units=row))
    given = ("--pattern", "structured:state", "--sparsity", "0.5", "--repair", "none")
    record = prune("--method", row.name, *given)
    assert {target["method"] for target in record["targets"]} == {row.name}
    got, was = AutoModelForCausalLM.from_pretrained("out").state_dict(), dense.state_dict()
    for layer in range(2):
        name = f"backbone.layers.{layer}.mixer.A_log"
        assert torch.equal(got[name], was[name][:, : was[name].shape[1] // 2])


def deeper_is_sparser(members: Sequence[Member], sparsity: float, number: float) -> list[float]:
    return [sparsity + (number if member.layer else -number) for member in members]


def test_a_made_up_allocation(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Allocation(
        "by-depth", "made up", "deeper is sparser", deeper_is_sparser, letter="STEP", default=0.125
    )
    monkeypatch.setitem(ALLOCATIONS, row.name, row)
    given = ("--method", "magnitude", "--target", "projections", "--sparsity", "0.5")
    for option, step in (("by-depth", 0.125), ("by-depth:0.25", 0.25)):
        record = prune("--allocation", option, *given, "--force")
        assert {target["allocation"] for target in record["targets"]} == {f"by-depth:{step:g}"}
        for target in record["targets"]:
            wanted = 0.5 + (step if target["layer"] else -step)
            assert target["sparsity"] == pytest.approx(wanted, abs=0.5 / 16)
    monkeypatch.delitem(ALLOCATIONS, row.name)
    assert "unknown allocation 'by-depth'" in refused(
        "prune", "dense", "-o", "out", "--allocation", "by-depth"
    )


# Rows that look at the calibration windows.


def quiet_inputs(weight: Tensor, seen: Any, rule: Rule, columns: slice) -> Tensor:
    return seen.power[columns].expand(len(weight), -1)


def test_a_made_up_method_that_looks_at_the_inputs(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = EntryMethod(
        "quiet", "made up", "inputs without energy", ("projections",), lambda *_: InputNorm(), quiet_inputs
    )
    monkeypatch.setitem(METHODS, row.name, Method(row))
    record = prune("--method", row.name, "--target", "projections", "--sparsity", "0.5")
    assert record["calibration"]["sha256"]
    got = AutoModelForCausalLM.from_pretrained("out").state_dict()
    for layer in range(2):
        gone = got[PLACE.format(layer, "in_proj")] == 0  # whole columns: all rows have the same scores
        assert torch.equal(gone, gone[:1].expand_as(gone)) and gone[0].float().mean() == 0.5


def loud_states(units: Units) -> Sequence[Tensor]:
    assert units.energy is not None
    return [-one for one in units.energy.double()]


def kept_states(dense: Any) -> list[set[int]]:
    """Which states of each layer are still in "out", by their columns of x_proj."""
    got, was = AutoModelForCausalLM.from_pretrained("out").state_dict(), dense.state_dict()
    found = []
    for layer in range(2):
        name, skip = PLACE.format(layer, "x_proj"), dense.config.time_step_rank
        rows = {tuple(row.tolist()) for row in got[name][skip:]}
        states = dense.config.state_size
        found.append({n for n in range(states) if tuple(was[name][skip + n].tolist()) in rows})
    return found


def test_a_made_up_method_for_units_that_looks_at_their_energy(
    dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = UnitMethod("loud", "made up", "the loudest go", ("state",), {"state": "energy"}, loud_states)
    monkeypatch.setitem(METHODS, row.name, Method(units=row))
    given = ("--pattern", "structured:state", "--sparsity", "0.5", "--repair", "none", "--force")
    prune("--method", row.name, *given)
    first = kept_states(dense)[0]
    prune("--method", "ghost", *given)  # keeps the loudest; the same energies in the first layer
    assert first == set(range(dense.config.state_size)) - kept_states(dense)[0]


def test_a_made_up_allocation_that_looks(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []

    def by_energy(members: Sequence[Member], sparsity: float, number: float) -> list[float]:
        heard.extend(member.seen for member in members)
        least = min(members, key=lambda member: member.seen)
        return [sparsity + (number if member is least else 0.0) for member in members]

    row = Allocation(
        "by-energy",
        "made up",
        "the quietest loses more",
        by_energy,
        watch=lambda weight, rule: InputNorm(),
        reduce=lambda weight, seen, rule, gone: float(seen.power.mean()),
        looks=True,
        letter="MORE",
        default=0.25,
    )
    monkeypatch.setitem(ALLOCATIONS, row.name, row)
    given = ("--method", "magnitude", "--target", "projections", "--sparsity", "0.5")
    record = prune("--allocation", row.name, *given)
    assert record["calibration"]["sha256"] and len(set(heard)) > 1 and min(heard) > 0
    more = [target for target in record["targets"] if target["sparsity"] > 0.6]
    assert len(more) == 1


def test_the_sides_of_a_row_have_one_name() -> None:
    entries = EntryMethod("a", "", "", ("ssm",), None, last_columns)
    with pytest.raises(ValueError, match="one name"):
        Method(entries, UnitMethod("b", "", "", ("state",), {}, last_units))
    with pytest.raises(ValueError, match="no side"):
        Method()
