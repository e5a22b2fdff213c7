"""The server: from the model to the end of the process.

Place in the flow: what `sparsessm serve` calls. uvicorn has the sockets and, while it runs, the signals: the
first one stops listening and gives the answers under way `GRACE` seconds, the second ends at once.
"""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from importlib.util import find_spec

from ..runtime.generation import Model
from .settings import Settings
from .watching import Monitor

GRACE = 30.0  # seconds for what is being answered when the server is told to end
BACKLOG = 2048
SWITCH = 0.0005  # seconds until a thread gives way to another: the engine must not wait for the web's


def refuse_without_libraries() -> None:
    """Refuse where the extra is not installed, before a model is read.

    Raises:
        ValueError: naming what to install.
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"serving needs {names}; install the extra: pip install 'sparsessm[serve]'")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, before the model is read: a port that is taken is said at once.

    Raises:
        ValueError: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with ExitStack() as failing:
            found = failing.enter_context(socket.socket(family, socket.SOCK_STREAM))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, port))
            failing.pop_all()
            return found
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


class Server:
    """A model being served.

    Attributes:
        address: where, as a URL without a path.
    """

    def __init__(
        self, model: Model, settings: Settings, listening: socket.socket, monitor: Monitor | None = None
    ) -> None:
        """
        Args:
            listening: of `bound`. monitor: watches the traffic.
        """
        import uvicorn

        from .api import Desk, create
        from .scheduler import Scheduler

        self.scheduler = Scheduler(
            model, batch=settings.batch, waiting=settings.waiting, cache=settings.cache, watcher=monitor
        )
        desk = Desk(model, self.scheduler, settings, monitor)
        hosts = ("127.0.0.1", "localhost", "[::1]", settings.host) if settings.local else None
        app = create(desk, settings.key, hosts)
        how = {"log_level": "error", "access_log": False, "lifespan": "off", "backlog": BACKLOG}
        config = uvicorn.Config(app, timeout_graceful_shutdown=int(GRACE), timeout_keep_alive=30, **how)
        self._server, self._listening = uvicorn.Server(config), listening
        host, port = listening.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Answer requests until a signal or `stop` ends it."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH)
        try:
            self._server.run(sockets=[self._listening])
        finally:
            sys.setswitchinterval(before)
            self.scheduler.close()
            self._listening.close()

    def stop(self) -> None:
        """Take no more requests, and end when those under way are answered; from any thread."""
        self._server.should_exit = True
