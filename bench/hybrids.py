"""Hybrids at real shapes, random weights: our runtime, llama.cpp and transformers, in turn in one run.

    python bench/hybrids.py --models FOLDER --llama FOLDER --json bench/results/hybrids.json
    python bench/hybrids.py --models FOLDER --llama FOLDER --shape qwen3.5-0.8b --alone

A model has one and two periods of its layers (three of the delta rule and one of attention; nine of Mamba-2
and one of attention; six layers that have both). What more periods would cost follows from the two: figures
of the whole depth are extrapolated, for weights, states and time alike, and every table says so. With --alone
also models whose layers of attention are recurrent ones too: what of the time is theirs.

A prompt of 512 tokens, then decoding of one sequence and of 16 at once, from an empty state; every
measurement in a process of its own, round by round (peers_processes.py); printed are medians. bench/peers.md
says how llama.cpp is built. Options: --shape NAME..., --threads N (2), --rounds N (3), --steps N of decoding
(16), --only PATTERN of variants, --keep the files of a shape (else they are removed behind it), --json FILE.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import transformers
from bench import cpu
from hybrids_files import ALONE, FULL, SHAPES, directory, made, shape_of
from peers_files import weights
from peers_processes import Failed, Processes, version

from sparsessm import kernels

VARIANTS = {  # what measures it, and the file; bits that are compared stand beside each other
    "transformers bf16": ("bf16", "stock-bf16"),
    "llama.cpp BF16": ("llama", "BF16.gguf"),
    "ours bf16": ("ours", "stock-bf16"),
    "llama.cpp Q8_0": ("llama", "Q8_0.gguf"),
    "ours int8": ("ours", "int8"),
    "llama.cpp Q4_0": ("llama", "Q4_0.gguf"),
    "ours 4.25 bits": ("ours", "bits-4.25"),
}
MEASURES = {"decode": "decode", "batch": "16 at once", "prompt": "prompt of 512"}


def measured(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """What each variant took: medians of the rounds, with one and with two periods."""
    chosen = {name: how for name, how in VARIANTS.items() if fnmatch.fnmatch(name, options.only)}
    if shape.endswith(ALONE):
        chosen.pop("transformers bf16", None)
    found: dict[str, Any] = {name: [] for name in chosen}
    for periods in (1, 2):
        paths = {
            name: made(options.models, shape, periods, file, options.llama)
            for name, (_, file) in chosen.items()
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        with Processes(options.llama, options.threads, options.steps) as processes:
            for _ in range(options.rounds):
                for name, (kind, _) in chosen.items():
                    try:
                        rounds[name].append(processes.measured(name, kind, paths[name]))
                    except Failed as failed:
                        print(f"{shape}, {name}: {failed}", flush=True)
        for name, seen in rounds.items():
            if seen:
                medians = {key: statistics.median(one[key] for one in seen) for key in seen[0]}
                found[name].append(medians | {"disk": weights(paths[name])})
    return found


def extrapolated(shape: str, cells: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the whole depth, by variant: tokens a second of each measure, bytes of weights and of a state."""
    _, layers, period, _ = shape_of(shape)
    whole = layers / len(period)
    rows = {}
    for name, both in cells.items():
        if len(both) < 2:
            continue
        values = {key: both[0][key] + (whole - 1) * (both[1][key] - both[0][key]) for key in both[0]}
        row = {measure: 1 / values[measure] for measure in MEASURES}
        rows[name] = row | {"MB": values["disk"] / 1e6, "GB/s": values["disk"] / values["decode"] / 1e9}
        if values.get("state"):
            rows[name]["state MB"] = values["state"] / 1e6
    return rows


def of_a_layer(shape: str, cells: dict[str, Any]) -> dict[str, float]:
    """Microseconds of decoding that a period's layers take, by variant."""
    return {name: 1e6 * (both[1]["decode"] - both[0]["decode"]) for name, both in cells.items() if both[1:]}


def shown(shape: str, cells: dict[str, Any]) -> None:
    rows, layers = extrapolated(shape, cells), shape_of(shape)[1]
    print(f"\n{shape}, tokens per second, extrapolated to {layers} layers:\n")
    print("| | MB | " + " | ".join(MEASURES.values()) + " | GB/s of decode | state, MB |")
    print("|---" * (len(MEASURES) + 4) + "|")
    for name, row in rows.items():
        speeds = " | ".join(f"{row[measure]:.4g}" for measure in MEASURES)
        state = f"{row['state MB']:.1f}" if "state MB" in row else "-"
        print(f"| {name} | {row['MB']:,.0f} | {speeds} | {row['GB/s']:.1f} | {state} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", default="*")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "cpu": cpu(),
        "kernels": kernels.LEVEL,
        "threads": options.threads,
        "transformers": transformers.__version__,
        "llama.cpp": version(options.llama) if options.llama else None,
        "cells": {},
    }
    if options.json and options.json.exists():
        found["cells"] = json.loads(options.json.read_text()).get("cells", {})
    for shape in options.shape:
        both = options.alone and FULL in shape_of(shape)[2]
        for which in (shape, *([shape + ALONE] if both else [])):
            cells = found["cells"][which] = measured(which, options)
            shown(which, cells)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
            if not options.keep:
                shutil.rmtree(options.models / directory(which))
        if both:
            theirs = of_a_layer(shape + ALONE, found["cells"][shape + ALONE])
            for name, spent in theirs.items():
                print(f"{shape}, {name}: {spent:.0f} us for a period of recurrent layers alone", flush=True)


if __name__ == "__main__":
    main()
