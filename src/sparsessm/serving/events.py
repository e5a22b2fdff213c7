"""What is asked of the scheduler, and what it tells.

Place in the flow: between `api.py`, which asks, and `scheduler.py`, which answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..runtime.sampling import Sampling


@dataclass(frozen=True)
class Asked:
    """A prompt and what is wanted of it.

    Attributes:
        ids: the prompt, checked (`Model.encode`), not empty.
        most: at most so many new tokens; 0 only reads the prompt.
        count: so many continuations.
        sampling: how tokens are chosen. seed: of the first continuation, the next number for the next; None:
            others every time.
        stops: texts that end a continuation.
        streaming: pieces of text are told as they come.
        top: log-probabilities of so many of the most probable tokens beside the chosen one; None: of none.
        echo: log-probabilities of the prompt's tokens, too.
        seconds: it may take, waiting included.
    """

    ids: list[int]
    most: int
    count: int = 1
    sampling: Sampling = Sampling()
    seed: int | None = None
    stops: tuple[str, ...] = ()
    streaming: bool = False
    top: int | None = None
    echo: bool = False
    seconds: float = 600.0


@dataclass(frozen=True)
class Told:
    """A token and how probable it was: its log-probability (None of a prompt's first), and the most probable
    tokens of its place with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Read:
    """The prompt was read: how many of its tokens came from a kept state, and what was told of them."""

    cached: int
    tokens: tuple[Told, ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of continuation `index`, the tokens that it came with, and what ended it, if it has ended:
    "length", "eos", "stop"."""

    index: int
    text: str
    tokens: tuple[Told, ...]
    finish: str | None = None


@dataclass(frozen=True)
class Failed:
    """The request ends without an answer. status: of HTTP."""

    message: str
    status: int = 500


Event = Read | Piece | Failed


class Full(Exception):
    """As many requests as may wait are waiting."""


class Watcher(Protocol):
    """Who looks at the traffic (`watching.py`)."""

    def prompt(self, ids: list[int], state: Tensor, logits: Tensor) -> None:
        """A prompt was read; the state (state_size,) and the logits (V,) after it."""
        ...


@dataclass
class Counts:
    """What happened since the start; read by `/metrics`, written by one thread."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    lookups: int = 0
    hits: int = 0
