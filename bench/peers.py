"""What others need for the same model, on this machine: llama.cpp, transformers and our runtime, in one run.

    python bench/peers.py --models FOLDER --llama FOLDER            # measures what is missing, or goes on
    python bench/peers.py --models FOLDER --llama FOLDER --shape 130m --threads 1 --only 'ours*' --again
    python bench/peers.py --table                                   # prints the tables of what was measured
    python bench/peers.py --write README.md bench/peers.md          # puts them where their markers are

Random weights of the real shapes, a prompt of 512 tokens, then decoding of one sequence and of 16 at once.
All variants run in turn, round by round, each in a process of its own; what counts is the median of all
rounds, and the median of the per-round ratios. A round in which something else on the machine waited for a
core for more than 3 % of the time does not count where others are left. Results are kept after each
measurement: a run that was stopped goes on where it was, and --again measures what it names once more.

Options: --shape (130m 1.4b mamba2-130m mamba2-1.3b), --threads (1 2), --rounds N (5), --only PATTERN,
--again, --json FILE (bench/results/peers.json). --models: where the files of peers_files.py are, or are made
(some 40 GB for all shapes). --llama: where llama.cpp's programs are; bench/peers.md says how to build them.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import peers_table
import torch
import transformers
from bench import cpu  # bench/bench.py
from peers_files import Missing, made, types, weights
from peers_processes import STEPS, Failed, Processes, version

from sparsessm import kernels

RESULTS = Path(__file__).parent / "results/peers.json"
SHAPES = ("130m", "1.4b", "mamba2-130m", "mamba2-1.3b")
VARIANTS = {  # what measures it, and the file; the first one is what ratios are taken to
    "llama.cpp BF16": ("llama", "BF16.gguf"),
    "llama.cpp Q8_0": ("llama", "Q8_0.gguf"),
    "llama.cpp Q4_0": ("llama", "Q4_0.gguf"),
    "llama.cpp Q4_K": ("llama", "Q4_K.gguf"),
    "llama.cpp Q2_K": ("llama", "Q2_K.gguf"),
    "transformers float32": ("fp32", "stock-fp32"),
    "transformers bfloat16": ("bf16", "stock-bf16"),
    "ours, dense bfloat16": ("ours", "stock-bf16"),
    "ours, half of bfloat16": ("ours", "half-bf16"),
    "ours, dense int8": ("ours", "int8"),
    "ours, 4.25 bits": ("ours", "bits-4.25"),
    "ours, 3.25 bits": ("ours", "bits-3.25"),
    "ours, 2.25 bits": ("ours", "bits-2.25"),
}
FAILED = (Missing, Failed, OSError, ValueError, AssertionError)


def machine(llama: Path | None) -> dict[str, Any]:
    """Where figures come from; those of one file are all of the same."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "kernels": kernels.LEVEL,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama.cpp": version(llama) if llama else None,
    }


class Results:
    """The file of results: {"machine", "cells": {shape: {threads: {variant: cell}}}}, a cell being {"disk",
    "types" of a GGUF file, "rounds": {number: what was measured}} or {"failed": why}."""

    def __init__(self, file: Path, here: dict[str, Any]) -> None:
        self._file = file
        self.all: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"cells": {}}
        known = self.all.setdefault("machine", here)
        if other := [
            name for name in here if here[name] is not None and known[name] not in (None, here[name])
        ]:
            told = ", ".join(f"{name} is {known[name]!r} there and {here[name]!r} here" for name in other)
            raise SystemExit(f"{file}: {told}; name another file with --json")
        known |= {name: value for name, value in here.items() if value is not None}

    def cell(self, shape: str, threads: int, name: str) -> dict[str, Any]:
        return self.all["cells"].setdefault(shape, {}).setdefault(str(threads), {}).setdefault(name, {})

    def save(self) -> None:
        """Whole or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.partial")
        partial.write_text(json.dumps(self.all, indent=1) + "\n")
        partial.replace(self._file)


def measure(
    options: argparse.Namespace, results: Results, shape: str, threads: int, names: list[str]
) -> None:
    """All rounds that are missing of one shape and number of threads."""
    paths: dict[str, Path] = {}
    for name in names:
        cell = results.cell(shape, threads, name)
        if options.again:
            cell.clear()
        cell.pop("failed", None)
        try:
            path = paths[name] = made(options.models, shape, VARIANTS[name][1], options.llama)
        except FAILED as reason:
            cell["failed"] = str(reason)
            print(f"{name}: {reason}", flush=True)
            continue
        cell["disk"] = weights(path)
        if path.suffix == ".gguf":
            cell["types"] = types(path)
    with Processes(options.llama, threads, STEPS[shape]) as processes:
        for turn in range(options.rounds):
            for name, path in paths.items():
                cell = results.cell(shape, threads, name)
                if "failed" in cell or str(turn) in cell.setdefault("rounds", {}):
                    continue
                begun = time.time()
                try:
                    found = processes.measured(name, VARIANTS[name][0], path)
                except FAILED as reason:
                    cell["failed"] = str(reason)
                    print(f"{name}: {reason}", flush=True)
                else:
                    cell["rounds"][str(turn)] = found | {"at": round(begun)}
                    took = f"{time.time() - begun:.0f} s"
                    print(
                        f"{shape}, {threads} threads, round {turn}, {name}: {took}",
                        file=sys.stderr,
                        flush=True,
                    )
                results.save()
    results.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, metavar="FOLDER")
    parser.add_argument("--llama", type=Path, metavar="FOLDER")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of the variants' names")
    parser.add_argument("--again", action="store_true", help="forget what was measured of them")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", nargs="+", type=Path, metavar="PAGE")
    options = parser.parse_args()
    if options.table or options.write:
        found = json.loads(options.json.read_text())
        for page in options.write or ():
            peers_table.write(page, found)
        if options.table:
            print("\n\n".join(peers_table.tables(found).values()))
        return
    if options.models is None:
        parser.error("--models is missing: where the models' files are, or are to be made")
    if options.llama is not None and not (options.llama / "llama-batched-bench").is_file():
        parser.error(f"--llama: no program llama-batched-bench in {options.llama}")
    names = [name for name in VARIANTS if any(fnmatch.fnmatchcase(name, one) for one in options.only)]
    if not names or min(*options.threads, options.rounds) < 1:
        parser.error(f"--threads and --rounds start at 1; --only is of: {', '.join(VARIANTS)}")
    results = Results(options.json, machine(options.llama))
    print(results.all["machine"], flush=True)
    for shape, threads in itertools.product(options.shape, options.threads):
        measure(options, results, shape, threads, names)
        print(peers_table.one(results.all, shape), flush=True)


if __name__ == "__main__":
    main()
