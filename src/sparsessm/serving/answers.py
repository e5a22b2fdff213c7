"""How answers are written: the objects of the OpenAI API, whole or in pieces.

Place in the flow: `api.py` fills an `Answer` with what `scheduler.py` tells, and sends what it says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from ..runtime.generation import Model
from ..runtime.text import UNKNOWN
from .events import Asked, Event, Piece, Read, Told

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


def failure(message: str, status: int, name: str | None = None) -> dict[str, Any]:
    """An error, as clients read it."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": name, "code": status}}


class Words:
    """Single tokens as text."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.tokenizer
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token: int) -> str:
        """The text of a token; one that is no text alone (part of a character) is named by its number."""
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return f"token_id:{token}" if UNKNOWN in text else text

    def text(self, ids: list[int]) -> str:
        """The text of a prompt, special tokens written out."""
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class Choice:
    """One continuation of one prompt."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.told: list[Told] = []
        self.finish: str | None = None


class Answer:
    """What is told of a request, and how it is written.

    Attributes:
        count: continuations of each prompt.
        wants_usage: a stream ends with its counts.
        begun: when it was asked. first: when the first token came (time.perf_counter()); 0: not yet.
        new_tokens: so far.
    """

    def __init__(
        self, kind: str, words: Words, name: str, asked: Sequence[Asked], *, echo: bool = False
    ) -> None:
        """
        Args:
            kind: "cmpl" (of `/v1/completions`) or "chatcmpl". name: of the model.
            echo: the prompt stands before its continuation.
        """
        self._kind, self._words, self._asked, self._echo = kind, words, asked, echo
        self.count, self.wants_usage = asked[0].count, False
        self._choices = [Choice() for one in asked for _ in range(one.count)]
        self._prompts: dict[int, tuple[Told, ...]] = {}
        self._cached = 0
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self.begun, self.first, self.new_tokens = time.perf_counter(), 0.0, 0

    def add(self, place: int, event: Event) -> None:
        """Take in what happened to prompt `place`."""
        if isinstance(event, Read):
            self._cached += event.cached
            self._prompts[place] = event.tokens
        elif isinstance(event, Piece):
            self.first = self.first or time.perf_counter()
            choice = self._choices[place * self.count + event.index]
            choice.text.append(event.text)
            choice.told += event.tokens
            choice.finish = event.finish
            self.new_tokens += len(event.tokens)

    @property
    def choices(self) -> int:
        """Continuations of all prompts."""
        return len(self._choices)

    def usage(self) -> dict[str, Any]:
        """Counts of tokens."""
        prompts = sum(len(one.ids) for one in self._asked)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompts + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def document(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for number, choice in enumerate(self._choices):
            text, told = "".join(choice.text), choice.told
            if self._echo:
                text, told = self._prompt_text(number) + text, [*self._prompt_told(number), *told]
            choices.append(self._choice(number, "message", text, told, choice.finish))
        named = {"cmpl": "text_completion", "chatcmpl": "chat.completion"}[self._kind]
        return {**self._head, "object": named, "choices": choices, "usage": self.usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for number in range(len(self._choices)):
            if self._kind == "chatcmpl":
                yield self._chunk([{"index": number, "delta": {"role": "assistant", "content": ""}}])
            elif self._echo and self._asked[0].top is None:
                yield self._chunk([self._choice(number, "delta", self._prompt_text(number), [], None)])

    def chunks(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        """What a stream says of an event."""
        if isinstance(event, Piece):
            number = place * self.count + event.index
            tokens = list(event.tokens)
            yield self._chunk([self._choice(number, "delta", event.text, tokens, event.finish)])
        elif isinstance(event, Read) and self._echo and event.tokens:
            for number in range(place * self.count, (place + 1) * self.count):
                told = self._prompt_told(number)
                yield self._chunk([self._choice(number, "delta", self._prompt_text(number), told, None)])

    def closing(self) -> Iterator[dict[str, Any]]:
        """What a stream ends with."""
        if self.wants_usage:
            yield {**self._chunk([]), "usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        named = {"cmpl": "text_completion", "chatcmpl": "chat.completion.chunk"}[self._kind]
        return {**self._head, "object": named, "choices": choices}

    def _choice(
        self, number: int, part: str, text: str, told: Sequence[Told], finish: str | None
    ) -> dict[str, Any]:
        reason = FINISH[finish] if finish else None
        logprobs = self._logprobs(told)
        if self._kind == "cmpl":
            return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        said: dict[str, Any] = {"content": text}
        if part == "message":
            said |= {"role": "assistant", "refusal": None}
        return {"index": number, part: said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        if self._asked[0].top is None:
            return None
        of = self._words.of
        if self._kind == "chatcmpl":

            def entry(token: int, logprob: float | None) -> dict[str, Any]:
                text = of(token)
                return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

            tops = [[entry(*pair) for pair in one.top] for one in told]
            rows = [entry(one.token, one.logprob) for one in told]
            return {"content": [row | {"top_logprobs": top} for row, top in zip(rows, tops, strict=True)]}
        texts = [of(one.token) for one in told]
        starts = list(accumulate(map(len, texts[:-1]), initial=0)) if texts else []
        tops = [one.top if one.logprob is not None else None for one in told]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [None if top is None else {of(i): p for i, p in top} for top in tops],
            "text_offset": starts,
        }

    def _prompt_text(self, number: int) -> str:
        return self._words.text(self._asked[number // self.count].ids)

    def _prompt_told(self, number: int) -> tuple[Told, ...]:
        return self._prompts.get(number // self.count, ())
