"""A sequence while it is being generated: it takes one token after another until something ends it.

Place in the flow: what `generation.py` and a server have in common. Who chooses the tokens, and where the
state lies meanwhile, is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .text import Stream


class Growing:
    """A prompt and what follows it.

    Attributes:
        prompt: its tokens.
        array: the state, float32 (state_size,) or longer; of its owner while the sequence is in a batch.
        most: at most so many new tokens.
        eos: tokens that end it.
        stream: the text of it; None where nobody looks at the text before it is complete.
        generator: of its draws.
        ids: the new tokens.
        finish: why it ended: "length", "eos" or "stop"; None: it has not.
        prompt_seconds: that reading the prompt took. ended: when it ended (time.perf_counter()).
    """

    def __init__(
        self,
        prompt: list[int],
        array: Tensor,
        most: int,
        eos: frozenset[int],
        stream: Stream | None,
        generator: torch.Generator,
    ) -> None:
        self.prompt, self.array, self.most, self.eos = prompt, array, most, eos
        self.stream, self.generator = stream, generator
        self.ids: list[int] = []
        self.finish: str | None = None
        self.prompt_seconds, self.ended = 0.0, 0.0

    def take(self, token: int) -> None:
        """Add a token, and say in `finish` whether that ends it."""
        self.ids.append(token)
        if token in self.eos:
            self.finish = "eos"
        elif self.stream and self.stream.push(token):
            self.finish = "stop"
        elif len(self.ids) == self.most:
            self.finish = "length"
        if self.finish in ("eos", "length") and self.stream and self.stream.finish():
            self.finish = "stop"

    @property
    def words(self) -> list[int]:
        """The new tokens that are text: without one that ended it."""
        return self.ids[:-1] if self.finish == "eos" else self.ids


def checked_stops(stop: Any) -> tuple[str, ...]:
    """The texts that end a continuation.

    Raises:
        ValueError: something else than a text or several, or an empty one.
    """
    if not isinstance(stop, Sequence):
        raise ValueError(f"stop is of type {type(stop).__name__}; allowed: a text or a list of texts")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if wrong := [one for one in stops if not isinstance(one, str) or not one]:
        raise ValueError(f"stop holds {wrong[0]!r}; allowed: texts of at least one character")
    return stops


def generators(seed: Any, count: int) -> list[torch.Generator]:
    """A generator of draws for each of `count` sequences.

    Args:
        seed: one for all, or one for each; None: another every time.

    Raises:
        ValueError: a seed that is not allowed, or too few.
    """
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * count
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} prompts; give one, or one for each")
    made = []
    for one in seeds:
        generator = torch.Generator()
        if one is None:
            generator.seed()
        elif type(one) is int and 0 <= one < 2**63:
            generator.manual_seed(one)
        else:
            raise ValueError(f"seed is {one!r}; allowed: 0 to {2**63 - 1}, or none")
        made.append(generator)
    return made
