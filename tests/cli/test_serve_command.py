"""`sparsessm serve`: from the command to the signal that ends it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import programs
import pytest
from command import refused

from sparsessm.serving import running
from sparsessm.serving.settings import Settings

SERVE = [sys.executable, "-m", "sparsessm", "serve", "builtin:pycode", "--port", "0"]


@contextmanager
def program(*words: str, **env: str) -> Iterator[tuple[Any, str]]:
    """A running server and its address."""
    with programs.Program([*SERVE, *words], env={**os.environ, **env}) as found:
        assert found.stderr
        for line in found.stderr:
            if where := re.search(r"served at (http://\S+)/v1; Ctrl-C ends it", line):
                break
        else:
            raise AssertionError("it ended before it served")
        try:
            yield found, where[1]
        finally:
            found.send_signal(signal.SIGKILL)


def test_a_signal_ends_it_when_answers_are_given() -> None:
    body = {"prompt": "def ", "max_tokens": 300, "temperature": 0, "stream": True}
    with program("--name", "mine") as (server, address):
        assert httpx.get(address + "/v1/models").json()["data"][0]["id"] == "mine"
        with httpx.Client(timeout=60) as client:
            with client.stream("POST", address + "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                server.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.wait() == 128 + signal.SIGTERM
        assert server.stderr.read() == "interrupted; the server has ended\n"


def test_the_key_is_of_the_environment() -> None:
    with program(SPARSESSM_API_KEY="a key") as (_, address):
        assert httpx.get(address + "/v1/models").status_code == 401
        keyed = {"Authorization": "Bearer a key"}
        assert httpx.get(address + "/v1/models", headers=keyed).status_code == 200


def test_what_cannot_be_served_is_refused_before_the_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}" in refused("serve", "builtin:pycode", "--port", port)
    assert "no.such.host.invalid" in refused("serve", "x", "--host", "no.such.host.invalid", "--port", "0")
    assert "--cache is 'much'" in refused("serve", "x", "--cache", "much", "--port", "0")
    assert "--watch compares states" in refused("serve", "x", "--watch", "--keys", "int8", "--port", "0")
    monkeypatch.setenv("SPARSESSM_API_KEY", "tab\there")
    assert "SPARSESSM_API_KEY is not a key" in refused("serve", "x", "--port", "0")
    monkeypatch.delenv("SPARSESSM_API_KEY")
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    assert "pip install 'sparsessm[serve]'" in refused("serve", "x", "--port", "0")


@pytest.mark.parametrize(
    "host, local", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("x", False)]
)
def test_which_addresses_are_of_this_machine_only(host: str, local: bool) -> None:
    assert Settings("m", host=host).local == local


def test_two_servers_in_one_process_do_not_meet() -> None:
    from served import served

    from sparsessm import runtime

    model = runtime.load("builtin:pycode")
    with served(model, name="one") as one, served(model, name="two") as two:
        asked = [threading.Thread(target=httpx.get, args=(s.address + "/v1/models",)) for s in (one, two)]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join()
        names = [httpx.get(s.address + "/v1/models").json()["data"][0]["id"] for s in (one, two)]
    assert names == ["one", "two"]
