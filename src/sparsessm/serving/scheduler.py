"""Continuous batching: requests join and leave a running batch; each gets what it would get alone.

Place in the flow: between the web (`api.py`) and an engine of `runtime/`. One thread has the engine. In each
turn it takes what waits while there are places, reads at most `SLAB` tokens of prompts, so that nobody who is
being answered waits longer, and takes every running sequence one token further. The last tokens of a prompt
go through the batch too, one a step, if they are few: alone they would cost as much as many. The idea is
Orca's (Yu et al., OSDI 2022); that prompts are read in pieces between steps is Sarathi's (Agrawal et al.,
2023).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.engine import SLAB
from ..runtime.generation import Model
from ..runtime.growing import Growing, generators
from ..runtime.sampling import choose
from ..runtime.text import Stream
from .events import Asked, Counts, Event, Failed, Full, Piece, Read, Told, Watcher
from .prefixes import Prefixes

FEW = 16  # tokens of a prompt that are read step by step: that costs less than a piece of its own
MORE = 64  # as many where at least `CROWD` sequences run, which make the steps anyway
CROWD = 4


@dataclass(eq=False)
class Ticket:
    """A request under way. `cancel` may be called from any thread."""

    asked: Asked
    tell: Callable[[Event], None]
    deadline: float
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.cancelled = True


class _Row:
    """A continuation; in the batch its state is that of the same place."""

    def __init__(
        self, model: Model, ticket: Ticket, index: int, state: Tensor, generator: torch.Generator
    ) -> None:
        asked = ticket.asked
        self.ticket, self.index, self.pieces, self.told = ticket, index, list[str](), list[Told]()
        self._decode = model.decode
        looked_at = asked.streaming or asked.stops  # else the text is made once, at the end
        stream = Stream(model.decode, asked.stops, self.pieces.append) if looked_at else None
        self.growing = Growing(asked.ids, state, asked.most, model.eos, stream, generator)

    places = 1  # in the batch

    @property
    def next(self) -> int:
        """The token that is fed next."""
        return self.growing.ids[-1]

    def take(self, token: int, logits: Tensor) -> None:
        """Add a token that was chosen from `logits` (V,), and tell it."""
        self.told.append(_told(token, logits, self.ticket.asked.top))
        self.growing.take(token)
        if self.growing.finish or (self.ticket.asked.streaming and self.pieces):
            self.tell()

    def tell(self) -> None:
        growing = self.growing
        text = "".join(self.pieces) if growing.stream else self._decode(growing.words)
        self.ticket.tell(Piece(self.index, text, tuple(self.told), self.growing.finish))
        self.pieces.clear()
        self.told.clear()


class _Reading:
    """A prompt that is being read, piece by piece, from the longest prefix that is kept."""

    def __init__(self, ticket: Ticket, state: Tensor, at: int, branch: int, logits: Tensor | None) -> None:
        self.ticket, self.state, self.at, self.branch, self.logits = ticket, state, at, branch, logits
        self.told = [Told(ticket.asked.ids[0])]
        self.cached = at

    @property
    def places(self) -> int:
        """In the batch, for its continuations."""
        return self.ticket.asked.count

    @property
    def next(self) -> int:
        """The token that is fed next, where it goes through the batch."""
        return self.ticket.asked.ids[self.at]

    def few(self, running: int) -> bool:
        """Whether the rest goes through the batch, where so many sequences run."""
        left = len(self.ticket.asked.ids) - self.at
        most = MORE if running >= CROWD else FEW
        return 0 < left <= most and self.at >= self.branch and not self.ticket.asked.echo

    @property
    def until(self) -> int:
        """Where the next piece ends: as `generate` cuts, and where the prompt leaves an earlier one."""
        ends = [len(self.ticket.asked.ids), (self.at // SLAB + 1) * SLAB]
        return min(ends + [self.branch] * (self.at < self.branch))


class Scheduler:
    """A model, a batch, and a queue in front of it.

    Attributes:
        counts: what happened since the start.
        prefixes: kept states.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch: int = 16,
        waiting: int = 256,
        cache: int = 0,
        watcher: Watcher | None = None,
    ) -> None:
        """
        Args:
            batch: sequences that run together. waiting: requests that may wait for a place.
            cache: bytes for kept states of prompts; 0: none are kept.
            watcher: looks at the traffic.
        """
        self.model, self.batch, self.waiting, self.watcher = model, batch, waiting, watcher
        self.counts, self.prefixes = Counts(), Prefixes(cache)
        self._states: list[Tensor] = []  # of the rows
        self._rows: list[_Row | _Reading] = []
        self._reading: deque[_Reading] = deque()
        self._queue: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="sparsessm-engine", daemon=True)
        self._thread.start()

    def ask(self, asked: Asked, tell: Callable[[Event], None]) -> Ticket:
        """Put a request into the queue.

        Args:
            asked: what is wanted. tell: called with what happens, from the engine's thread; must not block.

        Raises:
            Full: too many wait, or the scheduler is closing.
            ValueError: more continuations than the batch has places.
        """
        if asked.count > self.batch:
            raise ValueError(f"n is {asked.count}; allowed: 1 to {self.batch}, the size of the batch")
        ticket = Ticket(asked, tell, time.monotonic() + asked.seconds)
        with self._changed:
            if self._closing:
                raise Full("the server is shutting down")
            if len(self._queue) >= self.waiting:
                raise Full(f"{self.waiting} requests are waiting already; try again later")
            self._queue.append(ticket)
            self._changed.notify()
        return ticket

    def load(self) -> dict[str, int]:
        """Requests that wait and prompts that are read, sequences that run, kept states and their bytes."""
        waiting = len(self._queue) + len(self._reading)
        kept = {"kept": len(self.prefixes), "kept_bytes": self.prefixes.nbytes}
        return {"waiting": waiting, "running": len(self._rows), **kept}

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._queue or self._reading or self._rows)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread works."""
        return self._thread.is_alive()

    def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, give those that are there so many seconds, and end."""
        end = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            self._changed.notify()
        while time.monotonic() < end and self.alive and self.busy:
            time.sleep(0.02)
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    # The engine's thread.

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._reading or self._rows or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    break
            try:
                self._turn()
            except Exception as error:  # not of one request: all that run are lost, the server goes on
                self._abandon(Failed(f"the engine failed: {error}"), [])
        with self._changed:  # nobody is let in any more
            waiting = list(self._queue)
            self._queue.clear()
        self._abandon(Failed("the server is shutting down", 503), waiting)

    def _turn(self) -> None:
        self._drop()
        self._admit()
        left = SLAB
        while self._reading and (size := self._reading[0].until - self._reading[0].at) <= left:
            self._read(self._reading[0])
            left -= size
        if self._rows:
            self._step()

    def _abandon(self, failed: Failed, waiting: list[Ticket]) -> None:
        """End what runs, and these that wait."""
        tickets = {*waiting, *(one.ticket for one in (*self._reading, *self._rows))}
        self._reading.clear()
        self._rows.clear()
        self._states.clear()
        for ticket in tickets:
            ticket.tell(failed)

    def _drop(self) -> None:
        """Let go what nobody waits for, and what took too long."""
        now = time.monotonic()

        def over(ticket: Ticket) -> bool:
            if not ticket.cancelled and now > ticket.deadline:
                ticket.cancel()
                ticket.tell(
                    Failed(f"not done within {ticket.asked.seconds:g} s, the limit for a request", 504)
                )
            return ticket.cancelled

        with self._changed:
            self._queue = deque(ticket for ticket in self._queue if not over(ticket))
        self._reading = deque(reading for reading in self._reading if not over(reading.ticket))
        for place in reversed(range(len(self._rows))):
            if over(self._rows[place].ticket):
                self._leave(place)

    def _admit(self) -> None:
        """Take requests from the queue while there are places for all of their continuations."""
        while True:
            taken = sum(one.places for one in (*self._reading, *self._rows))
            with self._changed:
                if not self._queue or taken + self._queue[0].asked.count > self.batch:
                    return
                ticket = self._queue.popleft()
            self._reading.append(self._start(ticket))

    def _start(self, ticket: Ticket) -> _Reading:
        asked = ticket.asked
        kept, shared = None, 0
        if not asked.echo:  # of what is not read nothing can be told
            kept, shared = self.prefixes.find(asked.ids)
            self.counts.lookups += 1
            self.counts.hits += kept is not None
        if kept is None:
            return _Reading(ticket, self.model.engine.new_state(1)[0], 0, shared, None)
        return _Reading(ticket, kept.array.clone(), len(kept.tokens), shared, kept.logits)

    def _read(self, reading: _Reading) -> None:
        """Read a piece of a prompt. After the last one its continuations begin."""
        asked, begin = reading.ticket.asked, reading.at
        if reading.few(len(self._rows)):
            self._reading.popleft()
            self._join(reading, reading.state)
            return
        if begin < len(asked.ids):
            end = reading.until
            tokens = torch.tensor(asked.ids[begin:end])
            reading.state = self.model.engine.keys.room(reading.state, len(tokens))
            found = self.model.engine.prompt(tokens, reading.state, every=asked.echo)
            if asked.echo:
                following = asked.ids[begin + 1 : end + 1]
                rows = zip(following, found, strict=False)
                reading.told += [_told(token, logits, asked.top) for token, logits in rows]
                found = found[-1]
            reading.at, reading.logits = end, found
            if end == reading.branch:
                self._keep(asked.ids[:end], reading.state)
        if reading.at == len(asked.ids):
            self._reading.popleft()
            self._begin(reading)

    def _begin(self, reading: _Reading) -> None:
        """The prompt is read: its continuations join the batch."""
        ticket, asked, logits = reading.ticket, reading.ticket.asked, reading.logits
        assert logits is not None
        if not torch.isfinite(logits.max()):  # also where one of them is NaN
            ticket.tell(Failed("the logits are NaN or infinite: the model or its state is damaged"))
            return
        self.counts.prompt_tokens += len(asked.ids)
        self.counts.cached_tokens += reading.cached
        self._keep(asked.ids, reading.state, logits)
        if self.watcher is not None:
            self.watcher.prompt(asked.ids, reading.state, logits)
        ticket.tell(Read(reading.cached, tuple(reading.told) if asked.echo else ()))
        seeds = [None if asked.seed is None else (asked.seed + i) % 2**63 for i in range(asked.count)]
        for index, generator in enumerate(generators(seeds, asked.count)):
            row = _Row(self.model, ticket, index, reading.state, generator)
            if not asked.most:
                row.growing.finish = "length"
                row.tell()
                continue
            row.take(int(choose(logits, asked.sampling, generator)), logits)
            self.counts.new_tokens += 1
            if row.growing.finish is None:
                self._join(row, reading.state)

    def _keep(self, ids: list[int], state: Tensor, logits: Tensor | None = None) -> None:
        self.prefixes.keep(ids, self.model.engine.keys.trimmed(state), logits)

    def _join(self, row: _Row | _Reading, state: Tensor) -> None:
        self._states.append(state.clone())
        self._rows.append(row)

    def _step(self) -> None:
        """One token for every sequence."""
        rows, read = self._rows, list[_Reading]()
        states = self._states = [self.model.engine.keys.room(state, 1) for state in self._states]
        logits = self.model.engine.step(torch.tensor([row.next for row in rows]), states)
        tokens = self._choose(logits)
        self.counts.steps += 1
        for place in reversed(range(len(rows))):  # whoever leaves is replaced by the last, which is done
            row = rows[place]
            if isinstance(row, _Reading):
                row.at += 1
                if row.at == len(row.ticket.asked.ids):
                    row.logits = logits[place].clone()
                    row.state = states[place]
                    read.append(row)
                    self._leave(place)
                continue
            if tokens[place] < 0:
                self._leave(place)
                continue
            self.counts.new_tokens += 1
            row.take(tokens[place], logits[place])
            if row.growing.finish:
                known = [*row.growing.prompt, *row.growing.ids[:-1]]  # the last one was not fed
                self._keep(known, states[place])
                self._leave(place)
        for reading in reversed(read):
            self._begin(reading)

    def _choose(self, logits: Tensor) -> list[int]:
        """A token for each row; -1 where its logits are not finite, which is told, or none is needed."""
        first = self._rows[0].ticket.asked.sampling
        try:
            if first.temperature == 0 and all(row.ticket.asked.sampling == first for row in self._rows):
                return choose(logits, first).tolist()
        except ValueError:
            pass  # of one row: the others go on
        tokens = []
        for row, own in zip(self._rows, logits, strict=True):
            if isinstance(row, _Reading):
                tokens.append(-1)
                continue
            try:
                tokens.append(int(choose(own, row.ticket.asked.sampling, row.growing.generator)))
            except ValueError as error:
                row.ticket.tell(Failed(str(error)))
                row.ticket.cancel()
                tokens.append(-1)
        return tokens

    def _leave(self, place: int) -> None:
        """Take a sequence out of the batch; the last one takes its place."""
        last = len(self._rows) - 1
        self._rows[place], self._states[place] = self._rows[last], self._states[last]
        self._rows.pop()
        self._states.pop()


def _told(token: int, logits: Tensor, top: int | None) -> Told:
    """What is told of a token that follows logits (V,)."""
    if top is None:
        return Told(token)
    logprobs = torch.log_softmax(logits.double(), -1)
    best: Any = logprobs.topk(min(top, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Told(token, float(logprobs[token]), tuple(pairs))
