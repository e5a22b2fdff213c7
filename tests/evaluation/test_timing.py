"""The clockwork of measuring is what it says: phases, rounds that count, turns, memory. No time is ever
asserted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import both
from pico import pico_mamba
from torch import Tensor

from sparsessm.evaluation import timing
from sparsessm.evaluation.timing import Phase, Segment, Spread, clean, settled
from sparsessm.runtime.keys import Keys

GOOD, STOLEN = Segment(1.0, 0.01), Segment(1.0, 0.1)


class Recorder:
    """An engine that does nothing but say that it was called."""

    vocabulary, state_size, layout, nbytes, resident, keys = 64, 5, "", 1, 2, Keys(5, 0)

    def __init__(self, name: str, log: list[tuple[str, str, list[int]]], vocabulary: int = 64) -> None:
        self.name, self.log, self.vocabulary = name, log, vocabulary

    def new_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.state_size)

    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        assert state.shape == (self.state_size,) and not state.any()
        state += 1  # a prompt is read from the beginning each time
        self.log.append((self.name, "prompt", tokens.tolist()))
        return torch.zeros(self.vocabulary)

    def step(self, tokens: Tensor, state: Tensor) -> Tensor:
        assert state.shape == (len(tokens), self.state_size)
        self.log.append((self.name, f"step {len(tokens)}", tokens.tolist()))
        return torch.zeros(len(tokens), self.vocabulary)


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_a_phase_says_seconds_tokens_and_ratios_of_rounds() -> None:
    rounds = [(Segment(1.0, 0.0), Segment(2.0, 0.0)), (Segment(2.0, 0.0), Segment(8.0, None))]
    phase = Phase("decode", 4, 4, 10, rounds)
    assert phase.seconds(0) == Spread.of([0.1, 0.2])
    assert phase.speed(1) == Spread.of([20.0, 5.0])
    assert phase.ratio(0, 1) == Spread.of([2.0, 4.0])  # and not the ratio of the medians
    assert phase.ratio(1, 0) == Spread.of([0.5, 0.25])
    assert phase.ratio(1, 1) == Spread(1.0, 1.0, 1.0)
    assert not phase.watched and Phase("decode", 4, 4, 10, rounds[:1]).watched


def test_rounds_that_were_preempted_do_not_count() -> None:
    rounds = [(GOOD, GOOD), (GOOD, STOLEN), (STOLEN, GOOD), (GOOD, GOOD)]
    assert clean(rounds) == [True, False, False, True]
    assert clean([(Segment(1.0, 0.03),), (Segment(1.0, 0.031),)]) == [True, False]
    assert clean([(Segment(0.0, 0.0),)]) == [True]  # shorter than the clock
    assert clean([(Segment(1.0, None), GOOD), (Segment(1.0, None), STOLEN)]) == [True, False]


def test_what_one_thread_lost_is_what_its_clock_lacks() -> None:
    asleep = timing.segment(lambda: time.sleep(0.02), 2, 1)
    assert asleep.lost and 0.03 < asleep.lost <= asleep.wall
    assert clean([(asleep,)]) == [False]


def test_what_several_threads_lost_is_what_they_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for thread, text in (("1", "9 1500000000 3"), ("2", "9 500000000 3"), ("3", "")):
        (tmp_path / "tasks" / thread).mkdir(parents=True)
        (tmp_path / "tasks" / thread / "schedstat").write_text(text)
    (tmp_path / "tasks" / "4").mkdir()  # ended
    monkeypatch.setattr(timing, "TASKS", tmp_path / "tasks")
    assert timing.waited() == 2.0

    def wait() -> None:
        (tmp_path / "tasks" / "2" / "schedstat").write_text("9 750000000 4")

    assert timing.segment(wait, 1, 2).lost == 0.25
    for nowhere in (tmp_path / "absent", tmp_path / "tasks" / "4"):
        monkeypatch.setattr(timing, "TASKS", nowhere)
        assert timing.waited() is None
        assert timing.segment(lambda: None, 1, 2).lost is None


def test_there_is_always_a_number() -> None:
    good, stolen = (GOOD, GOOD), (GOOD, STOLEN)

    def of(*rounds: timing.Round) -> Phase:
        return settled(Phase("decode", 1, 1, 1, list(rounds)))

    some = of(good, stolen, good, good)
    assert (some.rounds, some.dropped, some.disturbed) == ([good] * 3, 1, False)
    few = of(good, stolen, stolen, good)
    assert (len(few.rounds), few.dropped, few.disturbed) == (4, 0, True)
    none = of(stolen)
    assert (len(none.rounds), none.dropped, none.disturbed) == (1, 0, True)
    assert of(good).disturbed is False  # no more than one was asked for


def test_engines_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SEGMENT", 0.0)
    monkeypatch.setattr(timing, "clean", lambda rounds: [True] * len(rounds))
    log: list[tuple[str, str, list[int]]] = []
    told: list[tuple[str, int, int, str]] = []
    engines = [Recorder("a", log), Recorder("b", log, vocabulary=7)]
    phases = timing.timed(
        engines, prompt=6, batches=(1, 3), rounds=4, progress=lambda *each: told.append(each)
    )
    names = [("prompt", 1, 6), ("decode", 1, 1), ("decode", 3, 3)]
    assert [(phase.name, phase.batch, phase.tokens) for phase in phases] == names
    assert [(phase.calls, len(phase.rounds), phase.dropped) for phase in phases] == [(1, 4, 0)] * 3
    kinds = ["prompt", "step 1", "step 3"]
    warm, rest = log[:6], log[6:]
    assert [(name, kind) for name, kind, _ in warm] == [(name, kind) for kind in kinds for name in "ab"]
    expected = [
        (name, kind) for turn in range(4) for kind in kinds for name in ("ab" if turn % 2 == 0 else "ba")
    ]
    assert [(name, kind) for name, kind, _ in rest] == expected
    for kind in kinds:  # both read the same tokens, which both have
        read = {name: [ids for by, what, ids in log if (by, what) == (name, kind)] for name in "ab"}
        assert read["a"] == read["b"]
        assert max(token for ids in read["a"] for token in ids) < 7
    assert told[-1] == ("bench", 12, 12, "") and len(told) == 12
    again: list[tuple[str, str, list[int]]] = []
    timing.timed([Recorder("a", again)], prompt=6, batches=(1, 3), rounds=1)
    log.clear()
    timing.timed([Recorder("a", log)], prompt=6, batches=(1, 3), rounds=1)
    assert log == again  # seeded


def test_what_does_not_count_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int, str]] = []

    def run(rounds: int, every: int) -> Phase:
        """Every so many rounds count."""

        def some(found: list[timing.Round]) -> list[bool]:
            return [number % every == every - 1 for number in range(len(found))]

        monkeypatch.setattr(timing, "clean", some)
        told.clear()
        engines = [Recorder("a", [])]
        (phase,) = timing.timed(
            engines, prompt=2, batches=(), rounds=rounds, progress=lambda *each: told.append(each)
        )
        assert told[-1] == ("bench", rounds, rounds, "")
        return phase

    half = run(4, 2)
    assert (len(half.rounds), half.dropped, half.disturbed) == (4, 4, False)
    third = run(9, 3)
    assert (len(third.rounds), third.dropped, third.disturbed) == (6, 12, False)  # not without end
    assert run(4, 100).disturbed


def test_a_slow_phase_has_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PHASE", 0.0)
    monkeypatch.setattr(timing, "clean", lambda rounds: [True] * len(rounds))
    (phase,) = timing.timed([Recorder("a", [])], prompt=2, batches=(), rounds=50)
    assert len(phase.rounds) == timing.FEWEST
    (phase,) = timing.timed([Recorder("a", [])], prompt=2, batches=(), rounds=2)
    assert len(phase.rounds) == 2


def test_the_memory_of_the_machine() -> None:
    found = timing.passes(2, 2**16)
    assert len(found) == 2 and all(seconds > 0 for each in found for seconds in each)
    said = timing.bandwidth([(1.0, 2.0), (2.0, 4.0), (4.0, 8.0)], 10**9)
    assert said.buffer == 10**9
    assert said.copy == Spread.of([2.0, 1.0, 0.5])  # reads and writes
    assert said.read == Spread.of([0.5, 0.25, 0.125])


def test_the_size_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timing.process_bytes()
    assert found is None or 2**20 < found < 2**40
    monkeypatch.setattr(timing, "STATM", Path("no/such/file"))
    assert timing.process_bytes() is None


@both
def test_what_an_engine_holds(make: Any) -> None:
    tied, own = make(pico_mamba()), make(pico_mamba(tie_word_embeddings=False))
    embedding = 4 * 64 * 16
    # a head of its own is read in place of the embedding, which stays in memory
    assert own.nbytes == tied.nbytes
    assert own.resident == tied.resident + embedding
    assert tied.resident >= tied.nbytes > embedding
