"""Engines timed side by side, and the memory's bandwidth: the clockwork of `speed.py`.

Place in the flow: above the engines (base.py), whose own calls it times. In every round each engine runs one
segment of each phase (reading a prompt, decoding at each batch size), one right after the other and in turn
the other way round, so that a machine that drifts slows all. What is said of two engines is the median of
their ratios round by round; its spread is from the first to the third quartile. Rounds in which a segment
was pre-empted do not count (`clean`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration.progress import Progress
from ..runtime.base import Engine

PROMPT, BATCHES, ROUNDS = 512, (1, 4, 16), 9
SEGMENT = 0.05  # seconds that a segment lasts at least
PHASE = 4.0  # seconds for all rounds of a phase, unless `FEWEST` rounds take longer
FEWEST = 3  # clean rounds that are enough to speak from
PREEMPTED = 0.03  # of a segment's wall time that its threads may have waited for a core
BUFFER = 256 * 2**20  # bytes: far beyond a last-level cache
PASSES = 4  # over the buffers, at once
DRAWN = 64  # different tokens of a sequence that is decoded
SEED = 0
STATM = Path("/proc/self/statm")  # Linux: the size of this process, in pages
TASKS = Path(
    "/proc/self/task"
)  # Linux: a directory for each thread; second number of its schedstat: ns waited


@dataclass(frozen=True)
class Spread:
    """The median of some values, and their first and third quartile."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Quartiles lie between the two nearest values; of one value all three are it."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Segment:
    """One timed stretch of one engine.

    Attributes:
        wall: seconds.
        lost: seconds in which threads of this process wanted a core and had none, added up; None where the
            system does not say it.
    """

    wall: float
    lost: float | None


Round = tuple[Segment, ...]  # one of each engine


@dataclass(frozen=True)
class Phase:
    """Reading a prompt, or decoding at one batch size, of every engine.

    Attributes:
        name: "prompt" or "decode".
        batch: sequences.
        tokens: of all sequences that a call of the engine reads.
        calls: in a segment.
        rounds: those that count, at least one.
        dropped: how many do not.
        disturbed: fewer than `FEWEST` were clean, so all count.
    """

    name: str
    batch: int
    tokens: int
    calls: int
    rounds: list[Round]
    dropped: int = 0
    disturbed: bool = False

    @property
    def watched(self) -> bool:
        """Whether the system said how long threads waited for a core."""
        return all(part.lost is not None for each in self.rounds for part in each)

    def seconds(self, engine: int) -> Spread:
        """Seconds of a call of one engine."""
        return Spread.of([each[engine].wall / self.calls for each in self.rounds])

    def speed(self, engine: int) -> Spread:
        """Tokens per second of one engine, of all sequences together."""
        return Spread.of([self.tokens * self.calls / each[engine].wall for each in self.rounds])

    def ratio(self, engine: int, other: int) -> Spread:
        """How many times as fast as `other` an engine is: of each round, then the median."""
        return Spread.of([each[other].wall / each[engine].wall for each in self.rounds])


@dataclass(frozen=True)
class Bandwidth:
    """What the machine's memory gives, in 1e9 bytes a second.

    Attributes:
        buffer: bytes of each of two float32 buffers.
        copy: from one to the other, bytes read and bytes written added up.
        read: finding the largest value of one, which only reads, as decoding does.
    """

    buffer: int
    copy: Spread
    read: Spread


def timed(
    engines: Sequence[Engine],
    *,
    prompt: int = PROMPT,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> list[Phase]:
    """Time engines side by side with torch's number of threads; all get the same tokens.

    Args:
        engines: at least one; those with a smaller vocabulary decide which tokens are drawn.
        prompt: tokens of the prompt.
        batches: sequences that are decoded together.
        rounds: of each phase; fewer of one that takes longer than `PHASE` seconds, at least `FEWEST`.
        progress: called with ("bench", done, total, "").

    Returns:
        The prompt, then decoding at each batch size.
    """
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = min(engine.vocabulary for engine in engines)
    threads = torch.get_num_threads()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, shape, generator=generator)

    text = draw(prompt)
    running = [_Running("prompt", 1, prompt, [_reader(each, text) for each in engines], rounds, threads)]
    for batch in batches:
        tokens = draw(DRAWN, batch)
        steppers = [_stepper(each, tokens) for each in engines]
        running.append(_Running("decode", batch, batch, steppers, rounds, threads))
    total, turn = sum(each.wanted for each in running), 0
    while going := [each for each in running if each.wants()]:
        for each in going:
            each.round(turn)
            if progress is not None:
                progress("bench", sum(other.counted for other in running), total, "")
        turn += 1
    if progress is not None and sum(each.counted for each in running) < total:
        progress("bench", total, total, "")  # rounds that were disturbed are not made up for without end
    return [each.phase() for each in running]


def clean(rounds: Sequence[Round]) -> list[bool]:
    """Which rounds count: those in which no segment lost more than `PREEMPTED` of its wall time to others, as
    far as the system says it."""
    return [all(part.lost is None or part.lost <= PREEMPTED * part.wall for part in each) for each in rounds]


def waited() -> float | None:
    """Seconds that the threads of this process have waited for a core so far; None where it is not known.

    Processor time would not do: a thread that spins until another one has a core again uses it up.
    """
    total, known = 0, False
    try:
        for task in TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
                known = True
            except (OSError, IndexError, ValueError):  # a thread that ended just now
                continue
    except OSError:
        return None
    return total / 1e9 if known else None


def segment(call: Callable[[], None], times: int, threads: int) -> Segment:
    """Time some calls. One thread lost what its own clock lacks of the wall's; of several, see `waited`."""
    before = waited() if threads > 1 else None
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(times):
        call()
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    if threads == 1:
        return Segment(wall, max(wall - cpu, 0.0))
    after = waited()
    return Segment(wall, None if before is None or after is None else max(after - before, 0.0))


class _Running:
    """A phase while it is being measured."""

    def __init__(
        self,
        name: str,
        batch: int,
        tokens: int,
        calls: Sequence[Callable[[], None]],
        rounds: int,
        threads: int,
    ) -> None:
        self._name, self._batch, self._tokens, self._run = name, batch, tokens, calls
        self._threads = threads
        self._rounds: list[Round] = []
        once = [self._segment(call, 1).wall for call in calls]  # fetches the weights, and starts the threads
        if min(once) < SEGMENT:  # where a beginning weighs
            once = [self._segment(call, 1).wall for call in calls]
        self._calls = math.ceil(max(SEGMENT / max(min(once), 1e-9), 1))
        self.wanted = min(rounds, max(FEWEST, int(PHASE / (self._calls * max(sum(once), 1e-9)))))
        self.counted, self._spent = 0, 0.0

    def wants(self) -> bool:
        """Whether rounds are missing; those that do not count are made up for while there is time."""
        if self.counted >= self.wanted:
            return False
        tried = len(self._rounds)
        return tried < self.wanted or (tried < 2 * self.wanted and self._spent < PHASE)

    def round(self, turn: int) -> None:
        """One segment of every engine, every other time in reverse."""
        order = list(range(len(self._run)))
        found = {i: self._segment(self._run[i], self._calls) for i in (order[::-1] if turn % 2 else order)}
        self._rounds.append(tuple(found[i] for i in order))
        self._spent += sum(part.wall for part in found.values())
        self.counted = min(sum(clean(self._rounds)), self.wanted)

    def _segment(self, call: Callable[[], None], times: int) -> Segment:
        return segment(call, times, self._threads)

    def phase(self) -> Phase:
        return settled(Phase(self._name, self._batch, self._tokens, self._calls, self._rounds))


def settled(phase: Phase) -> Phase:
    """The phase with the rounds that count; all of them if fewer than `FEWEST` are clean."""
    counts = clean(phase.rounds)
    kept = [each for each, counted in zip(phase.rounds, counts, strict=True) if counted]
    disturbed = len(kept) < min(FEWEST, len(phase.rounds))
    rounds = phase.rounds if disturbed else kept
    dropped = 0 if disturbed else len(counts) - len(kept)
    return Phase(phase.name, phase.batch, phase.tokens, phase.calls, rounds, dropped, disturbed)


def _reader(engine: Engine, text: torch.Tensor) -> Callable[[], None]:
    state = engine.keys.room(engine.new_state(1)[0], len(text))

    def read() -> None:
        state.zero_()
        engine.prompt(text, state)

    return read


def _stepper(engine: Engine, tokens: torch.Tensor) -> Callable[[], None]:
    """Decoding of `tokens` (steps, batch), again from the first behind the last; keys and values of attention
    are then written over."""
    columns, at, keys = tokens.unbind(), 0, engine.keys
    state = keys.room(engine.new_state(tokens.shape[1]), len(columns))

    def step() -> None:
        nonlocal at
        if keys.block and at == 0:
            state[:, keys.fixed - 1] = 0
        engine.step(columns[at], state)
        at = (at + 1) % len(columns)

    return step


def passes(count: int = PASSES, buffer: int | None = None) -> list[tuple[float, float]]:
    """Seconds of (copying, reading) a buffer of so many bytes, `BUFFER` if not given; with torch's number of
    threads."""
    source = torch.ones((BUFFER if buffer is None else buffer) // 4)
    target = torch.zeros_like(source)
    found = []
    for turn in range(count + 1):
        begun = time.perf_counter()
        target.copy_(source)
        between = time.perf_counter()
        source.amax()
        if turn:  # the first brings the pages
            found.append((between - begun, time.perf_counter() - between))
    return found


def bandwidth(found: Sequence[tuple[float, float]], buffer: int | None = None) -> Bandwidth:
    """What `passes` over buffers of so many bytes say."""
    size = BUFFER if buffer is None else buffer
    copies = [2 * size / copying / 1e9 for copying, _ in found]
    return Bandwidth(size, Spread.of(copies), Spread.of([size / reading / 1e9 for _, reading in found]))


def process_bytes() -> int | None:
    """Resident bytes of this process; None where the system does not say it this way."""
    try:
        pages = int(STATM.read_text().split()[1])
        import resource
    except (OSError, ImportError):
        return None
    return pages * resource.getpagesize()
