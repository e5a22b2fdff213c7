"""Hybrids at real shapes, random weights: our runtime, llama.cpp and transformers, in turn in one run.

    python bench/hybrids.py --models FOLDER --llama FOLDER --json bench/results/hybrids.json
    python bench/hybrids.py --table                             # prints what was measured
    python bench/hybrids.py --models FOLDER --llama FOLDER --shape qwen3.5-0.8b --alone

A model has one period of its layers (three of the delta rule and one of attention; nine of Mamba-2 and one of
attention; six layers that have both) and all of them, or as many as have --most bytes of weights (3e9 in
bfloat16; two at least). Of larger models, what more periods would cost follows from the two: such figures are
extrapolated, for weights, states and time alike, and the table says so. With --alone also models whose layers
of attention are recurrent ones too: what of the time is theirs.

Decoding cannot be faster than its weights are read. In every round this machine's rate of reading is measured
too (probing.py); "of the rate" is the share of it at which a variant reads its weights: what the kernels read
where that is known, else the file. It says nothing where experts are chosen.

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
from hybrids_files import ALONE, FULL, MOST, SHAPES, depths, directory, extrapolated, made, shape_of
from peers_files import weights
from peers_processes import Failed, Processes, version
from probing import compiled, reading

from sparsessm import kernels

VARIANTS = {  # what measures it, and the file; bits that are compared stand beside each other
    "transformers bf16": ("bf16", "stock-bf16"),
    "llama.cpp BF16": ("llama", "BF16.gguf"),
    "ours bf16": ("ours", "stock-bf16"),
    "llama.cpp Q8_0": ("llama", "Q8_0.gguf"),
    "ours int8": ("ours", "int8"),
    "llama.cpp Q4_0": ("llama", "Q4_0.gguf"),
    "ours 4.25 bits": ("ours", "bits-4.25"),
    "ours 3.25 bits": ("ours", "bits-3.25"),
}
RESULTS = Path(__file__).parent / "results/hybrids.json"
MEASURES = {"decode": "decode", "batch": "16 at once", "prompt": "prompt of 512"}


def measured(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """What each variant took: medians of the rounds, with each number of periods."""
    chosen = {name: how for name, how in VARIANTS.items() if fnmatch.fnmatch(name, options.only)}
    if shape.endswith(ALONE):
        chosen.pop("transformers bf16", None)
    found: dict[str, Any] = {name: [] for name in chosen}
    probe = compiled()
    for periods in depths(shape, options.most):
        paths = {
            name: made(options.models, shape, periods, file, options.llama)
            for name, (_, file) in chosen.items()
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        with Processes(options.llama, options.threads, options.steps) as processes:
            for _ in range(options.rounds):
                rate = reading(probe, options.threads)
                for name, (kind, _) in chosen.items():
                    try:
                        rounds[name].append(processes.measured(name, kind, paths[name]) | {"rate": rate})
                    except Failed as failed:
                        print(f"{shape}, {name}: {failed}", flush=True)
        for name, seen in rounds.items():
            if seen:
                medians = {key: statistics.median(one[key] for one in seen) for key in seen[0]}
                found[name].append(medians | {"disk": weights(paths[name]), "periods": periods})
    return found


def whole(shape: str, cells: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the whole depth, by variant: tokens a second of each measure, bytes of weights and of a state."""
    rows = {}
    for name, both in cells.items():
        if len(both) < 2:
            continue
        periods = [one["periods"] for one in both]
        values = {key: extrapolated(shape, periods, [one[key] for one in both]) for key in both[0]}
        read = values.get("weights") or values["disk"]
        row = {measure: 1 / values[measure] for measure in MEASURES} | {"MB": read / 1e6}
        if not shape_of(shape)[3].get("num_local_experts"):
            row["share"] = read / values["decode"] / both[-1]["rate"]
        if values.get("state"):
            row["state MB"] = values["state"] / 1e6
        rows[name] = row
    return rows


def of_a_layer(shape: str, cells: dict[str, Any]) -> dict[str, float]:
    """Microseconds of decoding that a period's layers take, by variant."""
    spent = {}
    for name, both in cells.items():
        if len(both) == 2:
            first, last = both
            more = last["periods"] - first["periods"]
            spent[name] = 1e6 * (last["decode"] - first["decode"]) / more
    return spent


def shown(shape: str, cells: dict[str, Any]) -> None:
    _, layers, period, _ = shape_of(shape)
    rows, most = whole(shape, cells), max(one["periods"] for both in cells.values() for one in both)
    how = f", extrapolated from {most * len(period)}" if most * len(period) < layers else ""
    print(f"\n{shape}, {layers} layers{how}, tokens per second:\n")
    print("| | weights, MB | " + " | ".join(MEASURES.values()) + " | of the rate | state, MB |")
    print("|---" * (len(MEASURES) + 4) + "|")
    for name, row in rows.items():
        speeds = " | ".join(f"{row[measure]:.4g}" for measure in MEASURES)
        state = f"{row['state MB']:.1f}" if "state MB" in row else "-"
        share = f"{row['share']:.2f}" if "share" in row else "-"
        print(f"| {name} | {row['MB']:,.0f} | {speeds} | {share} | {state} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--models", type=Path, default=Path("build/hybrids"))
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--most", type=float, default=MOST)
    parser.add_argument("--only", default="*")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.table:
        for shape, cells in json.loads(RESULTS.read_text())["cells"].items():
            shown(shape, cells)
        return
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
