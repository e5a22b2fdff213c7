"""What more processes bring: two against one on this machine, and on paper many GPUs.

    python bench/ranks.py --shape mamba-130m --layers 4 --samples 32 --length 1024

The same `prune` (without perplexity) alternately by one process and by several, one thread each; ratios of
the wall time are taken round by round. The results must have the same bytes.

    python bench/ranks.py --paper --shape mamba-2.8b

counts what one run multiplies and what processes send each other, and divides it by rates that are given: an
estimate, not a measurement. What one process alone does (factorise, sweep, refit) is what more of them cannot
shorten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from large import SHAPES, Shape, made

from sparsessm.report import machine

COLUMN = 40e-6  # seconds of a column of a sweep on a GPU: some launches, whatever the rows
REFITS = 24  # products of a matrix with its Hessian that a refit and the dense target take


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, default="mamba-130m")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", type=Path, help="where the model is made")
    options.add_argument("--paper", action="store_true")
    options.add_argument("--flops", type=float, default=40e12, help="of a GPU, on paper")
    options.add_argument("--link", type=float, default=25e9, help="bytes a second that a GPU sends, on paper")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    found = paper(given) if given.paper else measured(given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def measured(given: Any) -> dict[str, Any]:
    """Seconds of each run, and how many times as fast several processes were."""
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        made(SHAPES[given.shape], given.layers, folder / "stock")
        words = ["prune", str(folder / "stock"), "--samples", str(given.samples)]
        words += ["--length", str(given.length), "--no-eval", "--quiet"]
        seconds: dict[int, list[float]] = {1: [], given.processes: []}
        contents = set()
        for _ in range(given.rounds):
            for count, taken in seconds.items():
                out = folder / "out"
                taken.append(run(count, [*words, "-o", str(out)]))
                file = out / "model.safetensors"
                contents.add(hashlib.sha256(file.read_bytes()).hexdigest())
                shutil.rmtree(out)
                print(f"{count} processes: {taken[-1]:.1f} s", flush=True)
    assert len(contents) == 1, "another result"
    ratios = [one / more for one, more in zip(seconds[1], seconds[given.processes], strict=True)]
    print(f"{given.processes} processes are {statistics.median(ratios):.2f} times as fast as one")
    what = {name: getattr(given, name) for name in ("shape", "layers", "samples", "length", "processes")}
    return {"machine": machine.current(), **what, "seconds": seconds, "ratios": ratios}


def run(count: int, words: list[str]) -> float:
    """Seconds that so many processes take together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "sparsessm", *words]
    began = time.perf_counter()
    started = [
        subprocess.Popen(command, env={**os.environ, **where, "RANK": str(rank)}) for rank in range(count)
    ]
    if any(process.wait() for process in started):
        raise SystemExit("a run failed")
    return time.perf_counter() - began


def paper(given: Any) -> dict[str, Any]:
    """Seconds by the number of GPUs, from operations and bytes."""
    shape, tokens = SHAPES[given.shape], given.samples * given.length
    matrices = matrices_of(shape)
    forward = 2 * 2 * tokens * sum(out * inputs for out, inputs in matrices)  # pruned and dense
    grams = 2 * 2 * tokens * sum(inputs**2 for _, inputs in matrices)
    solving = sum(3 * inputs**3 + REFITS * 2 * out * inputs**2 for out, inputs in matrices)
    alone = solving / given.flops + sum(inputs for _, inputs in matrices) * COLUMN
    sent = sum(2 * 8 * inputs**2 + 4 * out * inputs for out, inputs in matrices)
    rows = []
    print(f"{given.shape}, {given.samples} windows of {given.length}: an estimate, see --help")
    print(print("GPUs sharing products  solving  sending   all, s times"))
    for count in (1, 8, 64, 512):
        sharing = min(count, -(-given.samples // 4))
        parts = [(forward + grams) / given.flops / sharing, alone, sent / given.link * (count > 1)]
        every = [shape.layers * part for part in parts]
        rows.append({"gpus": count, "sharing": sharing, "seconds": every})
        times = sum(rows[0]["seconds"]) / sum(every)
        told = " ".join(f"{part:8.1f}" for part in (*every, sum(every)))
        print(f"{count:4} {sharing:7} {told} {times:5.1f}")
    print(f"sent by each GPU: {shape.layers * sent / 1e9:.1f} GB")
    return {"shape": given.shape, "rows": rows, "bytes": shape.layers * sent}


def matrices_of(shape: Shape) -> list[tuple[int, int]]:
    """(outputs, inputs) of the pruned matrices of a layer whose inputs are watched."""
    width = shape.fields["hidden_size"]
    inner = shape.fields.get("intermediate_size", 2 * width)
    rank = shape.fields.get("time_step_rank", -(-width // 16))
    return [(2 * inner, width), (rank + 32, inner), (width, inner)]


if __name__ == "__main__":
    main()
