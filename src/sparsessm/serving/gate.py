"""What stands before the application: the key, the size of bodies, the names of the host, counts of answers.

Place in the flow: a plain ASGI layer around `api.py`: nothing is read or parsed of what is refused here.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from .answers import failure
from .metrics import Metrics

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = ("/health",)  # without a key
DRAINED = 8  # times the largest body


class Gate:
    """The application with its guard."""

    def __init__(
        self, app: Any, metrics: Metrics, key: str | None, hosts: Sequence[str] | None, body: int
    ) -> None:
        """
        Args:
            key: that clients send as `Authorization: Bearer KEY`; None: none is asked for.
            hosts: names that a request may be addressed to, which stops web pages that give their own name to
                this machine (DNS rebinding); None: any.
            body: bytes that a request may have.
        """
        self._app, self._metrics, self._key, self._hosts, self._body = app, metrics, key, hosts, body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        seen = 0

        async def measured() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body:
                raise HTTPException(413, self._large())  # FastAPI hands this one on
            return message

        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            if why := self._refusal(scope["path"], headers):
                await self._drain(receive)
                await _refuse(counted, *why)
            else:
                await self._app(scope, measured, counted)
        finally:
            self._metrics.answered(scope["path"], status or 499)

    async def _drain(self, receive: Receive) -> None:
        """Read over some of a body: who is cut off while it sends does not see the answer."""
        seen = 0
        while seen < DRAINED * self._body:
            message = await receive()
            seen += len(message.get("body", b"")) + 1
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    def _large(self) -> str:
        return f"the request is larger than {self._body:,} bytes, the limit"

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[str, int] | None:
        """What is wrong with a request before it is read; None: nothing."""
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name.lower() not in self._hosts:
            return f"this server is not {host!r}; it answers as {', '.join(self._hosts)}", 421
        if self._key is not None and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                return "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", 401
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._body:
            return self._large(), 413
        return None


async def _refuse(send: Send, message: str, status: int) -> None:
    body = json.dumps(failure(message, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] * (status == 413)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
