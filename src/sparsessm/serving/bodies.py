"""What a client may ask, as the OpenAI API names it; checked before anything is computed.

Place in the flow: `api.py` reads the bodies of requests with it. A field that changes the answer and that we
do not have is refused by name; fields that only say something about the client are read over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..runtime.growing import checked_stops
from ..runtime.sampling import Sampling

# They change nothing of an answer.
READ_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Values of fields that we do not have which mean that they are not used.
UNUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class StreamOptions(BaseModel):
    """What is streamed beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Body(BaseModel, ABC):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """Leave out what is not used; what is and cannot be is refused."""
        if not isinstance(given, dict):
            return given
        for name, values in UNUSED.items():
            if given.get(name) is not None and given[name] not in values:
                raise ValueError(f"{name} is not supported; leave it out")
        return {name: part for name, part in given.items() if name not in READ_OVER and name not in UNUSED}

    @abstractmethod
    def most(self) -> int | None:
        """At most so many new tokens; None: not said."""

    @abstractmethod
    def top(self) -> int | None:
        """Log-probabilities of so many of the most probable tokens; None: of none."""

    def sampling(self) -> Sampling:
        """How tokens are chosen; at temperature 0 filters say nothing."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature == 0:
            return Sampling()
        top_k = self.top_k if self.top_k and self.top_k > 0 else None  # clients write 0 or -1 for none
        return Sampling(temperature, top_k, None if self.top_p == 1 else self.top_p)

    def draws(self) -> int | None:
        """The seed of the first continuation; any whole number is taken."""
        return None if self.seed is None else self.seed % 2**63

    def stops(self) -> tuple[str, ...]:
        """Texts that end a continuation.

        Raises:
            ValueError: an empty one, or more than 16.
        """
        found = checked_stops(() if self.stop is None else self.stop)
        if len(found) > 16:
            raise ValueError(f"stop holds {len(found)} texts; allowed: at most 16")
        return found


class Completion(Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    def most(self) -> int | None:
        """As `Body.most`; the API's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def top(self) -> int | None:
        """As `Body.top`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt of it, a text or token ids."""
        prompt: Any = self.prompt
        many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return list(prompt) if many else [prompt]


class Message(BaseModel):
    """A message of a chat. Text only."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As a template takes it."""
        parts = self.content
        text = "".join(part.text for part in parts) if isinstance(parts, list) else parts or ""
        return {"role": self.role, "content": text}


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Chat(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def most(self) -> int | None:
        """As `Body.most`."""
        return self.max_completion_tokens or self.max_tokens

    def top(self) -> int | None:
        """As `Body.top`."""
        return (self.top_logprobs or 0) if self.logprobs else None
