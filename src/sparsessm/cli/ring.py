"""Which process of a run has gone, and why: what collective operations do not tell.

Each process has a connection to the next one, the last to the first. However a process ends, the system
closes its connections, so the one before it hears that at once. Who fails says why before; who hears of an
end passes it on to the one before it, so that all hear of it, and ends, even if it waits in native code for a
process that knows nothing yet.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Protocol, final

from ..data.foreign import first_line

PATIENCE = 40.0
"""Seconds until it is known who has gone: of a machine that is off one hears nothing."""
GRACE = 5.0
"""Seconds in which a process that has heard may come to its end by itself: to the same mistake, or to a
collective operation that fails, which leaves files as they should be."""
_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, questions
_LONGEST = 4096
_DONE = b"\n"


class Store(Protocol):
    """What the processes know of each other first (torch.distributed's)."""

    def set(self, key: str, value: str, /) -> None:
        """Say something."""
        ...

    def get(self, key: str, /) -> bytes:
        """What was said, as soon as it is."""
        ...


@final
class Ring:
    """The place of one process in it."""

    def __init__(self, store: Store, number: int, count: int, end: Callable[[BaseException], None]) -> None:
        """Meet the two neighbours. Where two cannot reach each other there is no ring, and nothing is heard.

        Args:
            number: of this process, of so many.
            end: ends this process with what is the matter; called from another thread.
        """
        self._number, self._following, self._end = number, (number + 1) % count, end
        self._why = ""
        self._heard, self._left, self._speaking = Event(), Event(), Lock()
        lines: list[socket.socket] = []
        try:
            lines += _neighbours(store, number, self._following)
            store.set(f"ring/met/{number}", "yes")
        except OSError:
            store.set(f"ring/met/{number}", "no")
        self._lines = lines if all(store.get(f"ring/met/{one}") == b"yes" for one in range(count)) else []
        if self._lines:
            Thread(target=self._listen, name="sparsessm-ring", daemon=True).start()

    def why(self) -> str:
        """Who has gone and why; "" if it cannot be said. Waits for it, as one is known to have gone."""
        if self._lines:
            self._heard.wait(PATIENCE)
        return self._why

    def leave(self, error: BaseException | None) -> None:
        """This process ends, with an error or without.

        If its end is said already, this does not return.
        """
        if error is not None and not self._heard.is_set():
            self._tell(f"process {self._number} of this run has failed: {first_line(error)}".encode())
        self._left.set()
        self._speaking.acquire()  # and keep it: the thread has no more to say
        if error is None:
            self._tell(b"")
        for line in self._lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _listen(self) -> None:
        told = b""
        with suppress(OSError), self._lines[0].makefile("rb") as lines:
            told = lines.readline(_LONGEST)
        if self._left.is_set() or told == _DONE:
            return
        gone = f"process {self._following} of this run has gone without a word (killed, or out of reach)"
        self._why = told.decode(errors="replace").strip() or gone
        self._tell(self._why.encode())  # before who waits in `why` can go on, leave, and close the lines
        self._heard.set()
        if self._left.wait(GRACE):
            return
        with self._speaking:
            self._end(ValueError(self._why))

    def _tell(self, what: bytes) -> None:
        with suppress(OSError, IndexError):
            self._lines[1].sendall(what.replace(b"\n", b" ")[: _LONGEST - 1] + _DONE)


def _neighbours(store: Store, number: int, following: int) -> tuple[socket.socket, socket.socket]:
    """Connections to the next process and from the one before; both know a word that others do not."""
    family, address = _own_address()
    with socket.create_server((address, 0), family=family) as door:
        if number == 0:
            store.set("ring/word", secrets.token_hex(16))
        store.set(f"ring/{number}", f"{address} {door.getsockname()[1]}")
        word = store.get("ring/word")
        host, port = store.get(f"ring/{following}").decode().split()
        behind = socket.create_connection((host, int(port)), timeout=PATIENCE)
        behind.sendall(word)
        before = _who_says(word, door)
    _keep_asking(behind)
    return behind, before


def _own_address() -> tuple[socket.AddressFamily, str]:
    """By which the others reach this machine: from where it reaches the one that all meet at."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # of datagrams: nothing is sent
        return family, probe.getsockname()[0]


def _who_says(word: bytes, door: socket.socket) -> socket.socket:
    """The neighbour; who else comes is sent away."""
    door.settimeout(PATIENCE)
    while True:
        line, _ = door.accept()
        line.settimeout(PATIENCE)
        with suppress(OSError):
            if secrets.compare_digest(_read(line, len(word)), word):
                line.settimeout(None)
                return line
        line.close()


def _read(line: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (more := line.recv(count - len(found))):
        found += more
    return found


def _keep_asking(line: socket.socket) -> None:
    """Notice within half a minute that the other machine is not there any more."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            line.setsockopt(socket.IPPROTO_TCP, option, value)
