"""What a scheduler tells of a request, for tests of several folders."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sparsessm.serving.events import Event, Failed, Piece, Read


class Heard:
    """What is told of a request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def until(self, wanted: Callable[[list[Event]], bool], seconds: float = 30.0) -> list[Event]:
        with self._changed:
            assert self._changed.wait_for(lambda: wanted(self.events), seconds), self.events
            return list(self.events)

    def done(self, count: int = 1) -> list[Event]:
        def ended(events: list[Event]) -> bool:
            ends = sum(isinstance(event, Piece) and event.finish is not None for event in events)
            return ends == count or any(isinstance(event, Failed) for event in events)

        return self.until(ended)

    def ids(self, index: int = 0) -> list[int]:
        pieces = [event for event in self.events if isinstance(event, Piece) and event.index == index]
        return [told.token for piece in pieces for told in piece.tokens]

    def text(self, index: int = 0) -> str:
        pieces = [event for event in self.events if isinstance(event, Piece) and event.index == index]
        return "".join(piece.text for piece in pieces)

    @property
    def cached(self) -> int:
        return next(event.cached for event in self.events if isinstance(event, Read))
