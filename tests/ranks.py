"""Several processes that work on one run, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from programs import Program


def start(count: int, *command: str) -> list[Program]:
    """As many processes that know of each other; {rank} in an argument is the number of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    every = {**os.environ, **where, "WORLD_SIZE": str(count)}
    words = [[word.replace("{rank}", str(rank)) for word in command] for rank in range(count)]
    return [Program([sys.executable, *own], {**every, "RANK": str(rank)}) for rank, own in enumerate(words)]


def ended(programs: Sequence[Program], timeout: float = 120) -> list[tuple[int, str, str]]:
    """How each ended: code, stdout, stderr."""
    found = [program.communicate(timeout) for program in programs]
    return [(program.wait(), *printed) for program, printed in zip(programs, found, strict=True)]


def command(count: int, *arguments: str, timeout: float = 120) -> list[tuple[int, str, str]]:
    """How `sparsessm ARGUMENTS` ended in each of so many processes."""
    return ended(start(count, "-m", "sparsessm.cli", *arguments), timeout)


def weights(folder: str) -> bytes:
    """Of a result."""
    return b"".join(path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors")))
