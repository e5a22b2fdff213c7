"""A model behind a server of this process, on a free port."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparsessm.runtime.generation import Model
from sparsessm.serving import running
from sparsessm.serving.settings import Settings


@contextmanager
def served(model: Model, monitor: Any = None, **settings: Any) -> Iterator[running.Server]:
    """A running server, which has ended afterwards."""
    how = Settings(**{"name": "tiny", "port": 0, **settings})
    listening = running.bound(how.host, how.port)
    listening.listen()  # so that who connects before the server runs waits for it
    server = running.Server(model, how, listening, monitor)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        with urllib.request.urlopen(server.address + "/health", timeout=60):
            pass
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def post(address: str, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and body of an answer, whatever the status is."""
    sent = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): text for name, text in headers.items()},
    }
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, sent), timeout=60) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
