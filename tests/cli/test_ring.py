"""Which process has gone, in one program: three places of a ring, each with a thread of its own."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from sparsessm.cli.ring import Ring


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the places say that have to end."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    return []


class Board:
    """What torch.distributed's store does, for threads."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def set(self, key: str, value: str, /) -> None:
        self._said[key] = value

    def get(self, key: str, /) -> bytes:
        while key not in self._said:
            time.sleep(0.001)
        return self._said[key].encode()


def three(ended: list[str]) -> list[Ring]:
    store = Board()
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda number: Ring(store, number, 3, lambda e: ended.append(str(e))), range(3)))


def killed(place: Ring) -> None:
    """Close its lines as the system does, without a word."""
    place._left.set()
    for line in place._lines:
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
        line.close()


def test_who_hears_first_passes_it_on_before_it_leaves(
    ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other thread waits for the reason, and closes the lines as soon as it has it."""
    tell = Ring._tell

    def slowly(place: Ring, what: bytes) -> None:
        time.sleep(0.3)
        tell(place, what)

    places = three(ended)
    monkeypatch.setattr(Ring, "_tell", slowly)
    killed(places[1])
    why = places[0].why()
    places[0].leave(ValueError(why))
    assert why.startswith("process 1 of this run has gone without a word")
    assert places[2].why() == why
    places[2].leave(ValueError(why))
    assert not ended


def test_who_failed_says_it_and_all_hear(ended: list[str]) -> None:
    places = three(ended)
    places[2].leave(ValueError("no text\nin the file"))
    for number in (1, 0):
        assert places[number].why() == "process 2 of this run has failed: no text"
        places[number].leave(ValueError("the other"))
    assert not ended


def test_who_does_not_come_to_its_end_is_ended(ended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsessm.cli.ring.GRACE", 0.1)
    places = three(ended)
    killed(places[0])
    until = time.monotonic() + 20
    while len(ended) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert ended == ["process 0 of this run has gone without a word (killed, or out of reach)"] * 2
    for place in places[1:]:
        killed(place)  # as their end would


def test_a_good_end_is_no_fault(ended: list[str]) -> None:
    places = three(ended)
    for place in places:
        place.leave(None)
    assert [place._why for place in places] == ["", "", ""] and not ended
