"""The processes of bench/peers.py: one that stays for each model in Python, and llama.cpp's, anew each time.

llama.cpp is measured by its own llama-batched-bench, in one run a prompt of 512 tokens, and decoding of one
sequence and of 16 that goes on from an empty state. A process in Python that stays waits for a line, without
using the cores; where memory becomes short, the one that was used longest ago is ended and begun anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers_files import weights
from peers_inside import BATCH, PROMPT

INSIDE = Path(__file__).with_name("peers_inside.py")
STEPS = {"130m": 32, "1.4b": 8, "mamba2-130m": 32, "mamba2-1.3b": 8}  # of decoding
PRESSURE = Path("/proc/pressure/cpu")  # Linux: how long something wanted a core and had none
ASKED = 0.1  # seconds between two looks at the memory of a program
ROOM, SPARE = 2.0, 2**30  # bytes in memory that a model may take: so many times its file, and so many


class Failed(Exception):
    """A process that did not give what it was asked for."""


def stalled() -> float | None:
    """Seconds so far in which something on this machine waited for a core; None where nobody says so."""
    try:
        first = PRESSURE.read_text().splitlines()[0]
    except OSError:
        return None
    return int(first.rpartition("total=")[2]) / 1e6


def available() -> int:
    """Bytes of memory that the system could give."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def program(words: list[Any], threads: int = 1) -> tuple[str, int]:
    """Run a program of llama.cpp: what it printed, and the most bytes that it had in memory, as far as it ran
    long enough to be asked."""
    command, most = [str(word) for word in words], 0
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(threads))
        while process.poll() is None:
            most = max(most, highest(process.pid))
            time.sleep(ASKED)
        out.seek(0)
        said = out.read().decode(errors="replace")
    if process.returncode:
        raise Failed(f"{Path(command[0]).name} ended with {process.returncode}: {said.strip()[-300:]}")
    return said, most


def highest(process: int) -> int:
    """The most bytes that a process has had in memory so far; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def version(folder: Path) -> str:
    """What llama.cpp says of itself."""
    said, _ = program([folder / "llama-batched-bench", "--version"])
    found = [line.split("version:", 1)[1].strip() for line in said.splitlines() if "version:" in line]
    return found[0] if found else said.strip()


def llama(folder: Path, path: Path, threads: int, steps: int) -> dict[str, float]:
    """As peers_inside.py prints it: seconds of each token, and the bytes of the whole process."""
    bench = folder / "llama-batched-bench"
    # A context of so few tokens that 16 prompts of 512 are left out, as it says nothing for a prompt of 1;
    # its room for keys and values is for all sequences together.
    sizes = ["-c", 1024, "-kvu", "-b", 2048, "-ub", PROMPT]
    sizes += ["-npp", f"1,{PROMPT}", "-ntg", steps, "-npl", f"1,{BATCH}"]
    form = ["--output-format", "jsonl", "-t", threads, "-tb", threads, "-m", path]
    said, most = program([bench, *sizes, *form], threads)
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    found = {(row["pp"], row["pl"]): row for row in rows}
    if not {(1, 1), (1, BATCH), (PROMPT, 1)} <= found.keys():
        raise Failed(f"llama-batched-bench printed {sorted(found)}: {said.strip()[-300:]}")
    return {
        "prompt": found[PROMPT, 1]["t_pp"] / PROMPT,
        "decode": found[1, 1]["t_tg"] / steps,
        "batch": found[1, BATCH]["t_tg"] / (steps * BATCH),
        "grown": most,
        "peak": most,
    }


class Inside:
    """A process of peers_inside.py."""

    def __init__(self, kind: str, path: Path, threads: int, steps: int) -> None:
        words = [sys.executable, INSIDE, kind, path, "--threads", threads, "--steps", steps]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [str(word) for word in words], stdin=pipe, stdout=pipe, text=True, env=environment(threads)
        )
        self._said()  # that it is ready

    def measured(self) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return json.loads(self._said())

    def _said(self) -> str:
        assert self._process.stdout is not None
        if said := self._process.stdout.readline():
            return said
        raise Failed(f"{INSIDE.name} ended with {self._process.wait()}")

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class Processes:
    """All that measures models of one shape with so many threads."""

    def __init__(self, folder: Path | None, threads: int, steps: int) -> None:
        self._folder, self._threads, self._steps = folder, threads, steps
        self._open: dict[str, Inside] = {}  # the one that was used last is the last

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._close()

    def measured(self, name: str, kind: str, path: Path) -> dict[str, float]:
        """One measurement, with the share of its time in which something waited for a core ("lost").

        Raises:
            Failed: it ended before.
        """
        if kind == "llama":
            if self._folder is None:
                raise Failed("--llama not given")
            self._make_room(path)
            folder = self._folder
            return self._watched(lambda: llama(folder, path, self._threads, self._steps))
        inside = self._open.pop(name, None)
        if inside is None:
            self._make_room(path)
            inside = Inside(kind, path, self._threads, self._steps)
        try:
            found = self._watched(inside.measured)
        except Failed:
            inside.end()
            raise
        self._open[name] = inside
        return found

    def _watched(self, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        before, begun = stalled(), time.perf_counter()
        found = run()
        after, wall = stalled(), time.perf_counter() - begun
        lost = {} if before is None or after is None else {"lost": round((after - before) / wall, 4)}
        return found | lost

    def _make_room(self, path: Path) -> None:
        while self._open and available() < ROOM * weights(path) + SPARE:
            self._close()

    def _close(self) -> None:
        self._open.pop(next(iter(self._open))).end()
