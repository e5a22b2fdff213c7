"""The running batch: each request gets what `generate` gives, whoever joins, leaves or gives up beside it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import both, native, reference
from heard import Heard
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from torch import Tensor

from sparsessm.runtime.engine import SLAB
from sparsessm.runtime.generation import Model
from sparsessm.runtime.keys import Keys
from sparsessm.runtime.sampling import Sampling
from sparsessm.serving.events import Asked, Failed, Full, Piece, Read
from sparsessm.serving.scheduler import Scheduler

FAMILIES = {"mamba": pico_mamba, "mamba2": pico_mamba2, "falcon_mamba": pico_falcon_mamba}
WARM = Sampling(0.9, 20)


@pytest.fixture
def closing() -> Iterator[list[Scheduler]]:
    made: list[Scheduler] = []
    yield made
    for scheduler in made:
        scheduler.close()
        assert not scheduler.alive


def made(closing: list[Scheduler], model: Model, **how: Any) -> Scheduler:
    closing.append(Scheduler(model, **how))
    return closing[-1]


def pico(make: Callable[[Any], Any] = native, family: str = "mamba") -> Model:
    model = FAMILIES[family]()
    return Model(make(model), pico_tokenizer(), model.config, bos=0)


def idle(scheduler: Scheduler) -> dict[str, int]:
    """What there is once nobody is being answered; the last place is given back after its answer."""
    end = time.monotonic() + 30
    while scheduler.busy and time.monotonic() < end:
        time.sleep(0.002)
    return scheduler.load()


def ask(scheduler: Scheduler, ids: list[int], most: int, **how: Any) -> Heard:
    heard = Heard()
    scheduler.ask(Asked(ids, most, **how), heard)
    return heard


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_requests_that_join_and_leave_get_what_they_get_alone(
    make: Any, family: str, closing: list[Scheduler]
) -> None:
    model, draw = pico(make, family), random.Random(0)
    scheduler = made(closing, model, batch=4)
    wanted = []
    for number in range(24):
        ids = [draw.randrange(model.engine.vocabulary) for _ in range(draw.randrange(1, 30))]
        sampling = draw.choice([Sampling(), WARM, Sampling(1.3, None, 0.9)])
        most, streaming = draw.randrange(1, 40), draw.random() < 0.5
        heard = ask(scheduler, ids, most, sampling=sampling, seed=number, streaming=streaming)
        wanted.append((ids, most, sampling, number, heard))
        if draw.random() < 0.3:
            time.sleep(0.002)
    for ids, most, sampling, seed, heard in wanted:
        heard.done()
        how = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        alone = model.generate(ids, most, seed=seed, **how)
        assert heard.ids() == alone.ids and heard.text() == alone.text
    assert scheduler.counts.new_tokens == sum(len(heard.ids()) for *_, heard in wanted)
    assert idle(scheduler)["running"] == 0


def test_several_continuations_of_one_prompt(closing: list[Scheduler]) -> None:
    model = pico()
    scheduler = made(closing, model, batch=4)
    heard = ask(scheduler, [1, 2, 3], 12, count=4, sampling=WARM, seed=7)
    heard.done(4)
    for index in range(4):
        alone = model.generate([1, 2, 3], 12, temperature=0.9, top_k=20, seed=7 + index)
        assert heard.ids(index) == alone.ids
    assert len({tuple(heard.ids(index)) for index in range(4)}) > 1
    with pytest.raises(ValueError, match="n is 5; allowed: 1 to 4"):
        scheduler.ask(Asked([1], 1, count=5), Heard())


def test_a_stop_text_ends_one_and_not_the_others(closing: list[Scheduler]) -> None:
    model = pico()
    whole = model.generate([4, 5], 60)
    stop = whole.text[20:23]
    scheduler = made(closing, model)
    stopped = ask(scheduler, [4, 5], 60, stops=(stop,))
    other = ask(scheduler, [4, 5], 60)
    (end,) = [event for event in stopped.done() if isinstance(event, Piece) and event.finish]
    assert end.finish == "stop" and stopped.text() == whole.text[: whole.text.index(stop)]
    other.done()
    assert other.text() == whole.text


def test_logprobs_are_those_of_the_models_logits(closing: list[Scheduler]) -> None:
    model = pico()
    scheduler = made(closing, model)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    heard = ask(scheduler, prompt, 5, top=3, echo=True)
    events = heard.done()
    read = next(event for event in events if isinstance(event, Read))
    told = [*read.tokens, *(one for event in events if isinstance(event, Piece) for one in event.tokens)]
    ids = [one.token for one in told]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 5
    want = torch.log_softmax(model.logits(ids).double(), -1)
    assert told[0].logprob is None and not told[0].top
    for place, one in enumerate(told[1:]):
        assert one.logprob is not None
        assert math.isclose(one.logprob, float(want[place, one.token]), abs_tol=1e-4)
        assert [token for token, _ in one.top] == want[place].topk(3).indices.tolist()


def test_a_long_prompt_is_read_between_the_steps_of_others(closing: list[Scheduler]) -> None:
    model = pico()
    long = [(7 * i) % model.engine.vocabulary for i in range(3 * SLAB + 17)]
    scheduler = made(closing, model, batch=2)
    running = ask(scheduler, [1, 2], 10_000, streaming=True)
    running.until(lambda events: len(events) > 3)
    before = scheduler.counts.steps
    heard = ask(scheduler, long, 8)
    heard.done()
    assert scheduler.counts.steps - before >= 4  # one after each piece of the prompt, and more
    assert heard.ids() == model.generate(long, 8).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_prefix_gives_the_same(family: str, closing: list[Scheduler]) -> None:
    model = pico(native, family)
    scheduler = made(closing, model, cache=1 << 24)
    base = [(5 * i + 3) % model.engine.vocabulary for i in range(200)]
    one, other = [*base, 1, 2, 3], [*base, 9, 8]
    first = ask(scheduler, one, 6)
    first.done()
    assert first.cached == 0
    again = ask(scheduler, one, 6)
    again.done()
    assert again.cached == len(one) and again.ids() == first.ids()
    branch = ask(scheduler, other, 6)  # shares the beginning, whose state nobody has kept
    branch.done()
    assert branch.cached == 0 and branch.ids() == model.generate(other, 6).ids
    third = ask(scheduler, [*base, 7], 6)  # now it is kept
    third.done()
    assert third.cached == len(base) and third.ids() == model.generate([*base, 7], 6).ids
    turn = [*one, *first.ids(), 30, 31]  # a chat goes on behind the answer
    last = ask(scheduler, turn, 6)
    last.done()
    assert last.cached == len(one) + 5 and last.ids() == model.generate(turn, 6).ids
    assert scheduler.counts.hits == 3 and scheduler.counts.lookups == 5


def test_who_gives_up_leaves_the_batch_and_the_queue(closing: list[Scheduler]) -> None:
    model = pico()
    scheduler = made(closing, model, batch=1)
    endless, heard = Asked([1], 1 << 30, streaming=True), Heard()
    ticket = scheduler.ask(endless, heard)
    heard.until(lambda events: len(events) > 2)
    waiting = scheduler.ask(Asked([2], 5), Heard())
    after = ask(scheduler, [3, 4], 5)
    waiting.cancel()
    ticket.cancel()
    after.done()
    assert after.ids() == model.generate([3, 4], 5).ids
    assert idle(scheduler) == {"waiting": 0, "running": 0, "kept": 0, "kept_bytes": 0}


def test_time_and_the_queue_have_limits(closing: list[Scheduler]) -> None:
    model = pico()
    scheduler = made(closing, model, batch=1, waiting=1)
    slow = ask(scheduler, [1], 1 << 30, seconds=2, streaming=True)
    slow.until(lambda events: len(events) > 2)
    late = ask(scheduler, [1], 3, seconds=0.1)
    with pytest.raises(Full, match="1 requests are waiting"):
        scheduler.ask(Asked([1], 1), Heard())
    failed = late.done()[-1]
    assert isinstance(failed, Failed) and failed.status == 504 and "0.1 s" in failed.message
    failed = slow.done()[-1]
    assert isinstance(failed, Failed) and "2 s" in failed.message
    fine = ask(scheduler, [1], 3)
    fine.done()
    assert len(fine.ids()) == 3


class Sick:
    """An engine that has NaN for one token, and fails whole for another."""

    vocabulary, state_size, layout, keys = 16, 1, "sick", Keys(1, 0)

    def new_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1)

    def step(self, tokens: Tensor, states: list[Tensor]) -> Tensor:
        if (tokens == 13).any():
            raise RuntimeError("out of order")
        logits = torch.zeros(len(tokens), self.vocabulary)
        logits.scatter_(1, torch.where(tokens == 10, 12, tokens)[:, None], 1)  # 10 is followed by 12
        logits[tokens == 12] = math.nan
        return logits

    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        logits = torch.zeros(self.vocabulary)
        logits[tokens[-1]] = math.nan if tokens[-1] == 11 else 1
        return logits


def test_a_sick_row_harms_nobody_else(closing: list[Scheduler]) -> None:
    model: Any = Model(Sick(), pico_tokenizer(), None)  # pyright: ignore[reportArgumentType]
    scheduler = made(closing, model)
    fine, sick, born = ask(scheduler, [3], 2000), ask(scheduler, [12], 50), ask(scheduler, [11] * 20, 50)
    for heard in (sick, born, ask(scheduler, [10], 50)):
        failed = heard.done()[-1]
        assert isinstance(failed, Failed) and failed.status == 500 and "NaN" in failed.message
    fine.done()
    assert fine.ids() == [3] * 2000
    broken = ask(scheduler, [13], 5).done()[-1]
    assert isinstance(broken, Failed) and "out of order" in broken.message
    again = ask(scheduler, [4], 3)
    again.done()
    assert again.ids() == [4] * 3 and scheduler.alive


def test_closing_ends_all(closing: list[Scheduler]) -> None:
    scheduler = Scheduler(pico(reference), batch=1)
    running, waiting = ask(scheduler, [1], 1 << 30), ask(scheduler, [2], 4)
    scheduler.close()
    for heard in (running, waiting):
        failed = heard.events[-1]
        assert isinstance(failed, Failed) and failed.status == 503
    with pytest.raises(Full, match="shutting down"):
        scheduler.ask(Asked([1], 1), Heard())


def test_closing_waits_for_answers_that_come_in_time() -> None:
    scheduler = Scheduler(pico(reference))
    heard = ask(scheduler, [1], 30)
    scheduler.close(30)
    assert isinstance(heard.events[-1], Piece) and len(heard.ids()) == 30
