"""float32 products against bfloat16 ones (`--compute`) at the shape of mamba-130m, random weights and tokens:
single products, then the whole default calibration and pruning of a few layers, then a perplexity.

    OMP_NUM_THREADS=1 python bench/compute.py --layers 2 --windows 8

Variants are interleaved round by round; printed are the medians and the median of the per-round ratios, of
the processor's time. Options: --rounds N (3), --layers N (2), --windows W (8) and --length L (2048), --json
FILE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import CHANNELS, RANK, STATES, WIDTH, cpu, model, show, stages
from measuring import random_tokens

from sparsessm.architectures import adapt
from sparsessm.evaluation.perplexity import perplexity
from sparsessm.kernels import products
from sparsessm.pruning import make_plan
from sparsessm.recipe.recipe import Recipe

ROWS = 2048
WAYS = ("float32", "bfloat16")
LINEAR = {
    "in_proj": (WIDTH, 2 * CHANNELS),
    "x_proj": (CHANNELS, RANK + 2 * STATES),
    "dt_proj": (RANK, CHANNELS),
    "out_proj": (CHANNELS, WIDTH),
    "1.4b in_proj": (2048, 8192),
    "1.4b out_proj": (4096, 2048),
}


def compared(rounds: int, variants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of the processor of each way, and how many times as fast the second is."""
    times: dict[str, list[float]] = {way: [] for way in variants}
    for turn in range(rounds + 1):
        for way, run in variants.items():
            start = time.process_time()
            run()
            if turn or rounds == 1:
                times[way].append(time.process_time() - start)
    first, second = times.values()
    ratio = statistics.median(a / b for a, b in zip(first, second, strict=False))
    found = {way: float(f"{statistics.median(taken):.4g}") for way, taken in times.items()}
    return {**found, "times as fast": round(ratio, 2)}


def single(rounds: int) -> dict[str, Any]:
    """(a) A slab through one linear layer, and into the moments of its inputs: seconds."""
    found: dict[str, Any] = {}
    for name, (inputs, outputs) in LINEAR.items():
        x, weight = torch.randn(ROWS, inputs), torch.randn(outputs, inputs)
        rows, dense = x.T, torch.randn(ROWS, inputs).T

        def passes(compute: str, work: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                with products.computing(compute):  # the weight is laid out once, as in a pass of four slabs
                    for _ in range(4):
                        work()

            return run

        def moments(left: Any, right: Any) -> Callable[[], None]:
            total = products.Sum()
            return lambda: total.add(left, right)

        for what, work in (
            (name, lambda x=x, weight=weight: products.linear(x, weight)),
            (f"{name}, Gram", None if name == "dt_proj" else moments(rows, rows)),
            (f"{name}, cross moments", None if name == "dt_proj" else moments(dense, rows)),
        ):
            if work is not None:
                found[what] = compared(rounds, {way: passes(way, work) for way in WAYS})
    return found


def whole(rounds: int, layers: int, windows: int, length: int) -> dict[str, Any]:
    """(b) The default run without perplexity, and where its time goes; seconds."""
    tokens = random_tokens(windows, length)

    def run(compute: str) -> Callable[[], None]:
        def once() -> None:
            dense = adapt(model(layers), compute=compute)
            recipe = Recipe(compute=compute).resolved(model="random", trained_length=length)  # type: ignore
            make_plan(recipe, dense).run(dense, tokens)

        return once

    found: dict[str, Any] = compared(rounds, {way: run(way) for way in WAYS})
    return found | {f"parts in {way}, s": stages(run(way), time.process_time) for way in WAYS}


def evaluation(rounds: int, layers: int, windows: int, length: int) -> dict[str, float]:
    """(c) Perplexity of the windows; seconds."""
    dense, tokens = model(layers), random_tokens(windows, length)
    run = {way: lambda way=way: perplexity(dense, tokens, n_bytes=1, compute=way) for way in WAYS}
    return compared(rounds, run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = options.layers, options.windows, options.length
    where = {"cpu": cpu(), "threads": torch.get_num_threads(), "bfloat16 by": products.unit() or "torch"}
    show("machine", where)
    results: dict[str, Any] = {"machine": where, "layers, windows, length": size}
    for title, run in (
        ("(a) single products", lambda: single(options.rounds)),
        ("(b) the default run", lambda: whole(options.rounds, *size)),
        ("(c) perplexity", lambda: evaluation(options.rounds, *size)),
    ):
        with torch.inference_mode(title.startswith("(a)")):
            results[title] = run()
        show(title, results[title])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
