"""Generate text: prompts in, continuations out, one sequence or many, from the beginning or from a state.

Place in the flow: above the engines (base.py), which read tokens; `sampling.py` chooses the next, `text.py`
turns them into text, `state.py` keeps what a sequence carries. `runtime.load` makes a `Model`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..checkpoint.given import undisturbed
from ..checkpoint.tokenizing import encode
from .base import Engine
from .growing import Growing, checked_stops, generators
from .sampling import Sampling, choose
from .state import State
from .text import Stream
from .threads import refuse_torch_threads

Ids = Sequence[int] | Tensor
Prompt = str | Ids
Batch = Sequence[str] | Sequence[Sequence[int]]


class Seconds(NamedTuple):
    """Wall clock time: reading the prompt, and everything after it."""

    prompt: float
    decode: float


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        text: of the continuation only, without the stop string, special tokens left out.
        ids: all tokens that were generated, also one that ended it (end of text, end of a stop string).
        finish: why it ended: "length", "eos" or "stop".
        state: after the last token that was fed, to continue from; the last of `ids` is pending in it.
        prompt_ids: the tokens of the prompt; with a state, what was pending in it comes first.
        seconds: for the prompt, and for the continuation: `len(ids) - 1` steps of the model, shared with the
            other sequences of a batch.
    """

    text: str
    ids: list[int]
    finish: str
    state: State
    prompt_ids: list[int]
    seconds: Seconds


class Model:
    """A model that generates.

    Attributes:
        engine: reads tokens.
        tokenizer: of transformers; text to tokens and back.
        config: the configuration of the stock model.
        eos: tokens that end a text.
        bos: the token that an empty prompt is read as, None if there is none.
        source: where the model came from.
        notes: what of the source is not followed, as `Checkpoint.notes`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        config: Any,
        *,
        eos: Iterable[int] = (),
        bos: int | None = None,
        source: str = "",
        notes: tuple[str, ...] = (),
    ) -> None:
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.eos, self.bos, self.source, self.notes = frozenset(eos), bos, source, notes

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None | Sequence[int | None] = 0,
        stop: str | Sequence[str] = (),
        on_token: Callable[[str], None] | None = None,
        ignore_eos: bool = False,
        state: State | None = None,
    ) -> Generated: ...

    @overload
    def generate(
        self,
        prompt: Batch,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None | Sequence[int | None] = 0,
        stop: str | Sequence[str] = (),
        on_token: None = None,
        ignore_eos: bool = False,
        state: State | None = None,
    ) -> list[Generated]: ...

    @undisturbed()
    def generate(
        self,
        prompt: Prompt | Batch,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None | Sequence[int | None] = 0,
        stop: str | Sequence[str] = (),
        on_token: Callable[[str], None] | None = None,
        ignore_eos: bool = False,
        state: State | None = None,
    ) -> Generated | list[Generated]:
        """Continue a prompt, or several at once.

        A sequence of a batch gets exactly what it would get alone: each has a generator of its own, seeded by
        `seed`, and leaves the batch when it has ended.

        Args:
            prompt: a text or its tokens, or a list of either. An empty one is read as the token that begins a
                text; with a state it adds nothing.
            max_new_tokens: at most so many tokens; 0 only reads the prompt.
            temperature: divides the logits; 0 takes the most probable token.
            top_k: only so many of the most probable tokens.
            top_p: only the fewest most probable tokens whose probabilities sum to at least this.
            seed: of the draws, the same for all prompts of a batch or one for each; None: another every time.
            stop: the text ends before the first occurrence of any of these.
            on_token: called with pieces of the text as they become certain; one prompt only.
            ignore_eos: go on after a token that ends a text.
            state: read the prompt after this state, which is not changed; all prompts of a batch begin there.

        Raises:
            ValueError: an argument that is not allowed, a token outside the vocabulary, an empty prompt for a
                model without a token that begins a text, a state of another model or a damaged one, or logits
                that are not finite.
        """
        refuse_torch_threads()
        sampling = Sampling(temperature, top_k, top_p)
        if type(max_new_tokens) is not int or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; allowed: a whole number from 0")
        stops = checked_stops(stop)
        many = _is_batch(prompt)
        prompts: list[Any] = list(prompt) if many else [prompt]
        if many and on_token is not None:
            raise ValueError(f"on_token needs a single prompt, got {len(prompts)}")
        if state is not None:
            self._refuse_foreign(state)
        names = [f"prompt {i}" for i in range(len(prompts))] if many else ["prompt"]
        texts = [self._begin(one, name, state) for one, name in zip(prompts, names, strict=True)]
        sequences = []
        eos = frozenset() if ignore_eos else self.eos
        for ids, generator in zip(texts, generators(seed, len(texts)), strict=True):
            array = self.engine.new_state(1)[0] if state is None else state.array.clone()
            stream = Stream(self.decode, stops, on_token) if stops or on_token else None
            sequences.append(Growing(ids, array, max_new_tokens, eos, stream, generator))
        begun = self._run(sequences, sampling)
        done = [self._generated(sequence, begun) for sequence in sequences]
        return done if many else done[0]

    @undisturbed()
    def logits(self, ids: Prompt) -> Tensor:
        """The logits after every token, from the beginning of a text.

        Args:
            ids: tokens, or a text; at least one token.

        Returns:
            float32 (L, V); row t predicts token t + 1.

        Raises:
            ValueError: no token, or one outside the vocabulary.
        """
        refuse_torch_threads()
        tokens = self.encode(ids)
        if not tokens:
            raise ValueError("no tokens were given; logits need at least one")
        state = self.engine.keys.room(self.engine.new_state(1)[0], len(tokens))
        return self.engine.prompt(torch.tensor(tokens), state, every=True)

    def encode(self, prompt: Prompt, *, name: str = "prompt", special: bool = True) -> list[int]:
        """The tokens of a text, or tokens checked.

        Args:
            prompt: a text or token ids.
            name: of it in error messages.
            special: with the tokens that the tokenizer puts around a text.

        Raises:
            ValueError: neither text nor token ids, or an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = encode(self.tokenizer, prompt, add_special_tokens=special)["input_ids"]
        elif isinstance(prompt, Tensor) and prompt.dim() == 1:
            ids = prompt.tolist()
        elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            ids = list(prompt)
        else:
            raise ValueError(f"{name} is of type {type(prompt).__name__}; allowed: a text or token ids")
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise ValueError(f"{name} holds {token!r} at {place}; allowed: whole numbers, token ids")
            if not 0 <= token < self.engine.vocabulary:
                most = self.engine.vocabulary - 1
                raise ValueError(f"{name} holds token {token} at {place}; the vocabulary has 0 to {most}")
        return [int(token) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _begin(self, prompt: Prompt, name: str, state: State | None) -> list[int]:
        """The tokens to feed first."""
        ids = self.encode(prompt, name=name, special=state is None)
        if state is not None:
            ids = [*state.pending, *ids]
        if ids:
            return ids
        if state is not None:
            raise ValueError(f"{name} is empty, and the state has no pending token; give at least one token")
        if self.bos is None:
            raise ValueError(
                f"{name} is empty, and the model has no token for the beginning of a text; give a token"
            )
        return self.encode([self.bos], name="the token for the beginning of a text")

    def _refuse_foreign(self, state: State) -> None:
        """A state is a handful of numbers: of another model they would be read as nonsense without a word."""
        if not isinstance(state, State):
            raise ValueError(
                f"state is of type {type(state).__name__}; allowed: a State, as in Generated.state"
            )
        if state.layout != self.engine.layout:
            own = self.engine.layout
            raise ValueError(
                f"state: it belongs to another model (layout {state.layout}, this one has {own})"
            )
        state.refuse_damaged("state")
        if wrong := self.engine.keys.misfit(state.array):
            raise ValueError(f"state: {wrong}")
        self.encode(state.pending, name="state.pending")

    def _run(self, sequences: list[Growing], sampling: Sampling) -> float:
        """Generate all sequences; returns when the prompts were read (time.perf_counter())."""
        rows, most = [], sequences[0].most if sequences else 0
        for sequence in sequences:
            begun = time.perf_counter()
            # without a token to choose, the last one of the prompt waits until the sequence goes on
            ids = sequence.prompt if most else sequence.prompt[:-1]
            if ids:
                sequence.array = self.engine.keys.room(sequence.array, len(ids))
                rows.append(self.engine.prompt(torch.tensor(ids), sequence.array))
            sequence.prompt_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        if not most:
            for sequence in sequences:
                sequence.finish, sequence.ended = "length", begun
            return begun
        active, logits = sequences, torch.stack(rows) if rows else torch.empty(0)
        while active:
            tokens = choose(logits, sampling, [sequence.generator for sequence in active])
            for sequence, token in zip(active, tokens.tolist(), strict=True):
                sequence.take(token)
            going = [i for i, sequence in enumerate(active) if sequence.finish is None]
            if len(going) < len(active):
                for sequence in active:
                    if sequence.finish is not None:
                        sequence.ended = time.perf_counter()
                active, tokens = [active[i] for i in going], tokens[going]
            if active:
                for sequence in active:
                    sequence.array = self.engine.keys.room(sequence.array, 1)
                logits = self.engine.step(tokens, [sequence.array for sequence in active])
        return begun

    def _generated(self, sequence: Growing, begun: float) -> Generated:
        last = sequence.ids[-1:] or sequence.prompt[-1:]
        return Generated(
            text=sequence.stream.text if sequence.stream else self.decode(sequence.words),
            ids=sequence.ids,
            finish=sequence.finish or "length",
            state=State(self.engine.keys.trimmed(sequence.array), self.engine.layout, tuple(last)),
            prompt_ids=sequence.prompt,
            seconds=Seconds(sequence.prompt_seconds, sequence.ended - begun),
        )


def _is_batch(prompt: Any) -> bool:
    """Whether these are several prompts; an empty list is one empty prompt."""
    if isinstance(prompt, Tensor):
        return prompt.dim() == 2
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return any(isinstance(one, (str, Sequence, Tensor)) for one in prompt)
