"""The OpenAI-compatible API: `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`.

Place in the flow: the web's side of `scheduler.py`. FastAPI reads and writes; `bodies.py` says what may be
asked, `answers.py` how an answer is written, `gate.py` stands before all of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..runtime.generation import Model
from .answers import Answer, Words, failure
from .bodies import Body, Chat, Completion
from .events import Asked, Event, Failed, Full, Piece
from .gate import Gate
from .metrics import TEXT, Metrics
from .scheduler import Scheduler, Ticket
from .settings import Settings
from .watching import Monitor


class Refused(Exception):
    """A request that gets an error. status: of HTTP. name: the field that it is about."""

    def __init__(self, message: str, status: int = 400, name: str | None = None) -> None:
        super().__init__(message)
        self.status, self.name = status, name


class Mailbox:
    """Events of a request's prompts, handed from the engine's thread to the event loop.

    Attributes:
        tickets: of the prompts.
    """

    def __init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self.tickets: list[Ticket] = []

    def put(self, place: int, event: Event) -> None:
        """What happened to prompt `place`; called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (place, event))
        except RuntimeError:  # the loop has ended: nobody waits
            pass

    async def get(self) -> tuple[int, Event]:
        """The next event, and of which prompt."""
        return await self._events.get()

    def cancel(self) -> None:
        """Nobody waits for an answer any more."""
        for ticket in self.tickets:
            ticket.cancel()


class Desk:
    """What the routes share: the model, the scheduler, limits, metrics."""

    def __init__(
        self, model: Model, scheduler: Scheduler, settings: Settings, monitor: Monitor | None
    ) -> None:
        self.model, self.scheduler, self.name, self.limits = model, scheduler, settings.name, settings
        self.words, self.metrics, self.begun = Words(model), Metrics(scheduler, monitor), int(time.time())
        self.monitor = monitor
        # One thread: a tokenizer may not be used by several at once.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="sparsessm-tokenizer")

    async def encode(self, prompt: str | list[int], special: bool = True) -> list[int]:
        """The tokens of a prompt, within the limit.

        Raises:
            Refused: too many, none, or outside the vocabulary.
        """

        def work() -> list[int]:
            ids = self.model.encode(prompt, special=special)
            return ids or ([] if self.model.bos is None else [self.model.bos])

        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._reader, work)
        except ValueError as error:
            raise Refused(str(error), name="prompt") from None
        if not ids:
            raise Refused("the prompt is empty, and the model has no token for the beginning of a text")
        if len(ids) > (most := self.limits.prompt_tokens):
            raise Refused(f"the prompt has {len(ids):,} tokens; allowed: at most {most:,}", name="prompt")
        return ids

    async def template(self, chat: Chat) -> list[int]:
        """The tokens of a chat, by the tokenizer's template.

        Raises:
            Refused: there is no template, or it does not take these messages.
        """
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            raise Refused("the model's tokenizer has no chat template; use /v1/completions")
        messages = [message.plain() for message in chat.messages]

        def work() -> str:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        try:
            text = await asyncio.get_running_loop().run_in_executor(self._reader, work)
        except Exception as error:  # a template is a program of the checkpoint's author
            raise Refused(
                f"the chat template does not take these messages: {error}", name="messages"
            ) from None
        return await self.encode(text, special=False)

    def asked(self, body: Body, ids: list[int], echo: bool = False) -> Asked:
        """A request for the scheduler.

        Raises:
            Refused: a value that is not allowed.
        """
        if body.model not in (None, self.name):
            raise Refused(f"there is no model {body.model!r}; served: {self.name!r}", 404, "model")
        limit = self.limits.new_tokens
        if (most := body.most()) is None:
            most = limit
        if most > limit:
            raise Refused(f"max_tokens is {most}; allowed: at most {limit}", name="max_tokens")
        try:
            how: dict[str, Any] = {"sampling": body.sampling(), "stops": body.stops(), "seed": body.draws()}
        except ValueError as error:
            raise Refused(str(error)) from None
        how |= {"streaming": bool(body.stream), "top": body.top(), "echo": echo}
        return Asked(ids, most, body.n or 1, seconds=self.limits.seconds, **how)

    def submit(self, asked: Sequence[Asked]) -> Mailbox:
        """Ask the scheduler for all of them, or for none.

        Raises:
            Refused: the queue is full, or it is too much at once.
        """
        box = Mailbox()
        if (total := sum(one.count for one in asked)) > (most := self.limits.prompts):
            raise Refused(f"{total} continuations are asked for at once; allowed: at most {most}")
        try:
            for place, one in enumerate(asked):
                box.tickets.append(self.scheduler.ask(one, partial(box.put, place)))
        except (Full, ValueError) as error:
            box.cancel()
            raise Refused(str(error), 503 if isinstance(error, Full) else 400) from None
        return box


async def events(box: Mailbox, answer: Answer) -> AsyncIterator[tuple[int, Event]]:
    """What happens to the prompts of a request, as it happens, until all continuations have ended."""
    left = [answer.count] * len(box.tickets)
    try:
        while any(left):
            place, event = await box.get()
            left[place] -= isinstance(event, Piece) and event.finish is not None
            if isinstance(event, Failed):
                left[place] = 0
            yield place, event
    finally:
        box.cancel()


async def gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(desk: Desk, request: Request, box: Mailbox, answer: Answer) -> Response:
    """The answer in one piece; given up when the client leaves."""

    async def collect() -> None:
        async for place, event in events(box, answer):
            if isinstance(event, Failed):
                raise Refused(event.message, event.status)
            answer.add(place, event)

    work, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            desk.metrics.timed(answer)
            return JSONResponse(answer.document())
        return Response(status_code=499)  # nobody reads it
    finally:
        leaving.cancel()
        work.cancel()
        box.cancel()


async def pieces(desk: Desk, box: Mailbox, answer: Answer) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    for first in answer.opening():
        yield _sent(first)
    async for place, event in events(box, answer):
        if isinstance(event, Failed):
            yield _sent(failure(event.message, event.status))
            return
        answer.add(place, event)
        for chunk in answer.chunks(place, event):
            yield _sent(chunk)
    desk.metrics.timed(answer)
    for last in answer.closing():
        yield _sent(last)
    yield "data: [DONE]\n\n"


def _sent(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def create(desk: Desk, key: str | None, hosts: Sequence[str] | None) -> Any:
    """The application.

    Args:
        key: that clients must send; None: none. hosts: names under which it answers; None: any.
    """

    app = FastAPI(title="sparsessm", docs_url=None, redoc_url=None, openapi_url=None)

    async def answered(request: Request, body: Body, asked: list[Asked], answer: Answer) -> Response:
        answer.wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        box = desk.submit(asked)
        if not body.stream:
            return await whole(desk, request, box, answer)
        return StreamingResponse(pieces(desk, box, answer), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(request: Request, body: Completion) -> Response:
        prompts = [await desk.encode(prompt) for prompt in body.prompts()]
        echo = bool(body.echo)
        asked = [desk.asked(body, ids, echo and body.logprobs is not None) for ids in prompts]
        return await answered(request, body, asked, Answer("cmpl", desk.words, desk.name, asked, echo=echo))

    @app.post("/v1/chat/completions")
    async def chats(request: Request, body: Chat) -> Response:
        asked = [desk.asked(body, await desk.template(body))]
        return await answered(request, body, asked, Answer("chatcmpl", desk.words, desk.name, asked))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": desk.name, "object": "model", "created": desk.begun, "owned_by": "sparsessm"}
        return {"object": "list", "data": [one]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != desk.name:
            raise Refused(f"there is no model {name!r}; served: {desk.name!r}", 404, "model")
        return (await models())["data"][0]

    @app.get("/health")
    async def health() -> Response:
        alive = desk.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    @app.get("/watch")
    async def watch(request: Request) -> Response:
        if desk.monitor is None:
            raise Refused("nothing is watched; start the server with --watch", 404)
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(desk.monitor.page())
        return JSONResponse(desk.monitor.record())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.metrics.page(), media_type=TEXT)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        retry = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(failure(str(error), error.status, error.name), error.status, headers=retry)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        said = first["msg"].removeprefix("Value error, ")
        return JSONResponse(failure(f"{place}: {said}" if place else said, 400, place or None), 400)

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        return JSONResponse(failure(str(error.detail), error.status_code), error.status_code)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return JSONResponse(failure(f"the server failed: {type(error).__name__}", 500), 500)

    return Gate(app, desk.metrics, key, hosts, desk.limits.body)
