"""What `prune --dry-run` foretells of time, memory and disk, beside what the run then takes.

    OMP_NUM_THREADS=1 python bench/foretold.py --case pycode --case "130m, 4 layers"

Each command runs in a process of its own; a dry run comes before the run and another after it, and their mean
counts, as machines drift. The clock of both is the processor's, so that what runs beside them does not count:
it is that of a quiet machine with one thread, and says nothing with more. Parts are compared by what the run
says of its stages; "all" is the whole command, imports, tokens and saving included. Of memory the kernel's
ru_maxrss counts, of the disk the most that was seen in the working directory. Printed is foretold / real.
Options: --case NAME (all), --json FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from large import SHAPES, made
from memory import cpu

# name -> (a model, or a shape and its layers; options of prune)
CASES: dict[str, tuple[str | tuple[str, int], list[str]]] = {
    "pycode": ("builtin:pycode", []),
    "pycode2": ("builtin:pycode2", ["--allocation", "loss"]),
    "pycode, sparsegpt": ("builtin:pycode", ["--method", "sparsegpt", "--target", "projections"]),
    "pycode2, 3 bits": ("builtin:pycode2", ["--bits", "3", "--target", "projections"]),
    "130m, 4 layers": (("mamba-130m", 4), ["--samples", "16", "--length", "512"]),
    "1.4b, 1 layer": (("mamba-1.4b", 1), ["--samples", "8", "--length", "1024", "--memory", "2GB"]),
}
# The command, with the processor's time where it looks at a clock.
PROGRAM = """
import sys
import time
import types
import sparsessm.cli
import sparsessm.cli.progress
import sparsessm.pruning.forecast
clock = types.SimpleNamespace(monotonic=time.process_time, perf_counter=time.process_time)
sparsessm.cli.progress.time = sparsessm.pruning.forecast.time = clock
sparsessm.cli.main()
"""
STAGES = {"fisher": "prices", "survey": "survey", "calibrate": "blocks", "evaluate": "perplexity"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in given.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = compared(*CASES[name], Path(folder))
        print(name, json.dumps(rows[name]), flush=True)
    if given.json:
        where = {"machine": cpu(), "threads": os.environ.get("OMP_NUM_THREADS")}
        given.json.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


def compared(model: str | tuple[str, int], options: list[str], folder: Path) -> dict[str, Any]:
    """One run and the two dry runs around it."""
    if not isinstance(model, str):
        made(SHAPES[model[0]], model[1], folder / "model")
        model = str(folder / "model")
    command = [sys.executable, "-c", PROGRAM, "prune", model, *options, "--json"]
    dry = [json.loads(run([*command, "--dry-run"], folder)["out"])["cost"]]
    real = run([*command, "-o", str(folder / "out")], folder)
    dry.append(json.loads(run([*command, "--dry-run"], folder)["out"])["cost"])
    parts = stages(real["events"])
    foretold = {part: sum(one["seconds"][part] for one in dry) / 2 for part in parts}
    whole = sum(sum(one["seconds"].values()) for one in dry) / 2
    seconds = {"all": (whole, real["cpu"]), "stages": (whole, sum(parts.values()))}
    seconds |= {part: (foretold[part], taken) for part, taken in parts.items() if taken > 0}
    measured = {
        **{f"seconds, {part}": pair for part, pair in seconds.items()},
        "memory": (sum(one["memory"] for one in dry) / 2, real["peak"]),
        "disk": (sum(one["disk"] for one in dry) / 2, real["disk"]),
    }
    return {
        "foretold / real": {what: round(a / b, 2) for what, (a, b) in measured.items() if b},
        "real": {what: round(b, 1) for what, (_, b) in measured.items()},
        "dry runs, seconds": [round(sum(one["seconds"].values()), 1) for one in dry],
        "memory of stages": seen(real["events"]),
    }


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """One command: what it prints and tells, seconds of the processor, bytes at its peak and of its working
    directory."""
    most, ended = 0, threading.Event()
    with open(folder / "printed", "w+") as printed, open(folder / "told", "w+") as told:
        process = subprocess.Popen(command, stdout=printed, stderr=told)

        def watch() -> None:
            nonlocal most
            while not ended.wait(0.02):
                most = max(most, taken(folder / "out.unfinished"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        ended.set()
        watcher.join()
        printed.seek(0), told.seek(0)
        lines = told.read().splitlines()
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{' '.join(command)} ended with {code}: {lines[-1:]}")
        events = [json.loads(line) for line in lines if line.startswith("{")]
        out = printed.read()
    return {
        "out": out,
        "events": events,
        "cpu": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss * 1024,
        "disk": most,
    }


def taken(folder: Path) -> int:
    """Bytes of the files in a directory that is being worked in."""
    found = 0
    try:
        for path in folder.iterdir():
            found += path.stat().st_size
    except FileNotFoundError:  # not made yet, or it goes
        pass
    return found


def stages(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each part of a run, as its events say at the end of a stage."""
    found = dict.fromkeys(STAGES.values(), 0.0)
    for event in events:
        if event["event"] == "progress" and event["done"] >= event["total"]:
            found[STAGES[event["stage"]]] += event["seconds"]
    return found


def seen(events: list[dict[str, Any]]) -> dict[str, int]:
    """The most memory that the events of a stage told, in MiB."""
    found: dict[str, int] = {}
    for event in events:
        if event["event"] == "progress":
            part = STAGES[event["stage"]]
            found[part] = max(found.get(part, 0), event["memory"] >> 20)
    return found


if __name__ == "__main__":
    main()
