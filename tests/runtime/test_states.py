"""States of sequences: generating goes on from them; they are forked, saved, and refused where they do not
fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import both, reference
from pico import pico_mamba, pico_tokenizer
from safetensors.torch import load_file, save_file

from sparsessm.runtime.generation import Generated, Model
from sparsessm.runtime.state import State

PROMPT = [5, 9, 30, 2, 41, 17]


def pico(make: Callable[[Any], Any] = reference, **fields: Any) -> Model:
    """Random weights that never end a text by themselves."""
    model = pico_mamba(**fields)
    return Model(make(model), pico_tokenizer(), model.config, bos=0)


def same(first: Generated, second: Generated) -> None:
    """All but the time."""
    assert first.ids == second.ids
    assert (first.text, first.finish, first.prompt_ids) == (second.text, second.finish, second.prompt_ids)
    assert torch.equal(first.state.array, second.state.array)
    assert first.state.pending == second.state.pending


@both
def test_going_on_from_a_state_is_one_long_text(make: Any, tmp_path: Path) -> None:
    model = pico(make)
    whole = model.generate(PROMPT, 60)
    for cut in (0, 1, 25):
        first = model.generate(PROMPT, cut)
        assert first.ids == whole.ids[:cut] and len(first.state.pending) == 1
        before = first.state.fork()
        rest = model.generate([], 60 - cut, state=first.state)
        assert first.ids + rest.ids == whole.ids
        assert torch.equal(before.array, first.state.array)  # not changed
        first.state.save(tmp_path / "state")
        again = model.generate("", 60 - cut, state=State.load(tmp_path / "state"))
        same(again, rest)
    # a prompt in two parts is the prompt
    part = model.generate(PROMPT[:4], 0)
    assert (part.text, part.ids, part.state.pending) == ("", [], (PROMPT[3],))
    assert model.generate(PROMPT[4:], 60, state=part.state).ids == whole.ids
    # several prompts after one state
    ends = model.generate([PROMPT[4:], [3]], 20, state=part.state)
    assert ends[0].ids == whole.ids[:20]
    assert ends[1].ids == model.generate([*PROMPT[:4], 3], 20).ids


def test_a_fork_is_independent() -> None:
    state = pico().generate(PROMPT, 3).state
    fork = state.fork()
    fork.array.fill_(1)
    assert not torch.equal(fork.array, state.array)
    assert (fork.layout, fork.pending) == (state.layout, state.pending)


def test_a_state_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model = pico()
    state = model.generate(PROMPT, 3).state
    with pytest.raises(ValueError, match="it belongs to another model .layout .*, this one has"):
        pico(num_hidden_layers=3).generate([1], 3, state=state)
    for change, words in (
        (state.array[:-1], "it has 575 values, this model"),
        (state.array.double(), "the state is float64"),
        (state.array[None], "expected a vector of float32"),
        (state.array * math.nan, "holds NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=words.replace("575", str(len(state.array) - 1))):
            model.generate([1], 3, state=State(change, state.layout, state.pending))
    with pytest.raises(ValueError, match="state.pending holds token 64 at 0; the vocabulary has 0 to 63"):
        model.generate([1], 3, state=State(state.array, state.layout, (64,)))
    with pytest.raises(ValueError, match="state is of type dict"):
        model.generate([1], 3, state={})  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ValueError, match="prompt is empty, and the state has no pending token"):
        model.generate([], 3, state=State(state.array, state.layout))


def test_files_that_are_no_states_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "state"
    state = pico().generate(PROMPT, 3).state
    state.save(file)
    state.save(file)  # replaces
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    whole, tensors = file.read_bytes(), load_file(file)
    notes = {"format": "sparsessm state 1", "layout": state.layout, "pending": "[1]"}

    def refused(words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            State.load(file)
        assert str(file) in str(caught.value)

    for length in (0, 7, 50, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused("truncated or not a safetensors file")
    save_file(tensors, file)
    refused("not a saved state .format: none")
    save_file({"other": tensors["state"]}, file, notes)
    refused("not a saved state")
    for pending in ("{}", "[-1]", "[1.5]", "[true]", "[", '"1"'):
        save_file(tensors, file, notes | {"pending": pending})
        refused("a damaged state")
    save_file(tensors, file, {"format": notes["format"]})
    refused("a damaged state")
    save_file({"state": tensors["state"] * math.inf}, file, notes)
    refused("holds NaN or Inf")
    save_file({"state": tensors["state"].double()}, file, notes)
    refused("the state is float64")
    file.unlink()
    refused("no such file")
    with pytest.raises(ValueError, match="cannot be written"):
        state.save(tmp_path / "no/such/place")


def test_what_a_file_of_a_state_holds(tmp_path: Path) -> None:
    state = pico().generate(PROMPT, 3).state
    state.save(tmp_path / "state")
    header = (tmp_path / "state").read_bytes()
    length = int.from_bytes(header[:8], "little")
    notes = json.loads(header[8 : 8 + length])["__metadata__"]
    assert notes == {
        "format": "sparsessm state 1",
        "layout": state.layout,
        "pending": str(list(state.pending)),
    }
