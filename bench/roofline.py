"""What limits each kernel here: cycles and bytes of a product, beside what memory and arithmetic allow.

    python bench/roofline.py                            # measures, about 10 minutes, and keeps the results
    python bench/roofline.py --write docs/roofline.md   # puts the tables of the results on the page

Every form of a matrix (dense, half of it removed, codes of one width, codes as `prune --bits` makes them) at
every level of kernels that this processor has, for 1, 4 and 16 inputs and one thread and two: in_proj of
mamba-130m and 1.4b, so many copies in turn that they come from memory, and of the 130m so few that the last
cache holds them. A time is the median of rounds in which the cores were ours; limits are measured by
probing.py. The limit that takes longer is the one that is named, and the share is that of the time which it
explains.

Options: --shape 130m 1.4b, --form NAMES, --levels, --threads (1 2), --rounds N (5), --json FILE
(bench/results/roofline.json), --table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peers_table
import roofline_page
import torch
from bench import cpu
from probing import CACHE, PRODUCTS, limits
from runtime import SHAPES, coded

from sparsessm import kernels
from sparsessm.evaluation.timing import PREEMPTED, segment
from sparsessm.kernels.matrix import Matrix

RESULTS = Path(__file__).parent / "results/roofline.json"
INPUTS = (1, 4, 16)
COLD = 192 * 2**20  # bytes of matrices that come from memory
SEGMENT = 0.06  # seconds of one measurement
WIDTHS, BITS = (2, 3, 4), (2.25, 3.25, 4.25)


class Form(NamedTuple):
    """A kind of matrix: `kind` is what multiplies it, `make` gives one of (rows, cols)."""

    kind: str
    make: Callable[[int, int], Matrix]


def floats(rows: int, cols: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def dense(dtype: torch.dtype) -> Callable[[int, int], Matrix]:
    def make(rows: int, cols: int) -> Matrix:
        values = floats(rows, cols)
        if dtype is not torch.int8:
            return Matrix.dense(values.to(dtype))
        return Matrix.dense((values * 1500).round().clamp(-127, 127).to(dtype), torch.full((rows,), 0.001))

    return make


def masked(dtype: torch.dtype) -> Callable[[int, int], Matrix]:
    def make(rows: int, cols: int) -> Matrix:
        kept = torch.rand(rows, cols, generator=torch.Generator().manual_seed(1)) < 0.5
        places = 2 ** torch.arange(8)
        mask = (kept.view(rows, -1, 8) * places).sum(2).to(torch.uint8)
        values = floats(rows, cols)[kept]
        if dtype is not torch.int8:
            return Matrix.packed(mask, cols, values.to(dtype))
        whole = (values * 1500).round().clamp(-127, 127).to(dtype)
        return Matrix.packed(mask, cols, whole, torch.full((rows,), 0.001))

    return make


def of_width(width: int) -> Callable[[int, int], Matrix]:
    def make(rows: int, cols: int) -> Matrix:
        most = 1 << width - 1
        codes = torch.randint(-most, most, (rows, cols), generator=torch.Generator().manual_seed(2))
        return Matrix.codes(codes.short(), torch.full((rows,), 0.001), torch.ones(cols))

    return make


def of_dial(bits: float) -> Callable[[int, int], Matrix]:
    def make(rows: int, cols: int) -> Matrix:
        codes = torch.from_numpy(coded("in_proj", (rows, cols), bits).codes())
        return Matrix.codes(codes, torch.full((rows,), 0.001), torch.ones(cols))

    return make


FORMS = {
    "dense float32": Form("floats", dense(torch.float32)),
    "dense bfloat16": Form("floats", dense(torch.bfloat16)),
    "dense int8": Form("codes", dense(torch.int8)),
    "half bfloat16": Form("floats", masked(torch.bfloat16)),
    "half int8": Form("int8", masked(torch.int8)),
    **{f"codes of {width} bits": Form("codes", of_width(width)) for width in WIDTHS},
    **{f"dial, {bits} bits": Form("codes", of_dial(bits)) for bits in BITS},
}


class Turning:
    """Copies of a matrix, multiplied in turn."""

    def __init__(self, matrix: Matrix, copies: list[Matrix]) -> None:
        self._all = [matrix, *copies]
        self._next, self.matrix = itertools.cycle(each.native for each in self._all), matrix

    def product(self, level: str, threads: int, inputs: int) -> Callable[[], None]:
        x = torch.randn(inputs, self.matrix.cols, generator=torch.Generator().manual_seed(3))
        out = torch.empty(inputs, self.matrix.rows)

        def run() -> None:
            next(self._next).product(level, threads, x, None, False, out)

        return run


def measured(turning: Turning, levels: list[str], threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of a product, for every level and number of inputs, all in turn."""
    runs = {(level, inputs): turning.product(level, threads, inputs) for level in levels for inputs in INPUTS}
    calls = {key: math.ceil(SEGMENT / segment(run, 1, threads).wall) for key, run in runs.items()}
    taken = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            taken[key].append(segment(run, calls[key], threads))
    for (level, inputs), found in taken.items():
        kept = [one for one in found if one.lost is None or one.lost <= PREEMPTED * one.wall]
        seconds = statistics.median(one.wall for one in kept or found) / calls[level, inputs]
        yield {"level": level, "inputs": inputs, "seconds": seconds, "disturbed": not kept}


def cells(options: argparse.Namespace, most: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All that is measured, with the limits of each."""
    clock = max(limit["hertz"] for limit in most.values())
    for name, shape, place in itertools.product(options.form, options.shape, ("memory", "cache")):
        if place == "cache" and shape != options.shape[0]:
            continue
        form, width = FORMS[name], SHAPES[shape][0]
        rows, cols = 4 * width, width
        matrix = form.make(rows, cols)
        size = COLD if place == "memory" else CACHE
        count = size // matrix.nbytes if place == "cache" else math.ceil(size / matrix.nbytes)
        turning = Turning(matrix, [form.make(rows, cols) for _ in range(count - 1)])
        for threads in options.threads:
            torch.set_num_threads(threads)
            for found in measured(turning, options.levels, threads, options.rounds):
                products = rows * cols * found["inputs"]
                read = matrix.nbytes + 4 * found["inputs"] * (rows + cols)
                limit = most[threads]
                by = {
                    "memory": read / limit["bytes"][place],
                    "arithmetic": products / limit["products"][found["level"]][form.kind],
                }
                named = max(by, key=lambda one: by[one])
                yield {
                    "form": name,
                    "shape": shape,
                    "from": place,
                    "threads": threads,
                    **found,
                    "bits": 8 * matrix.nbytes / (rows * cols),
                    "bytes": read,
                    "GB/s": read / found["seconds"] / 1e9,
                    "GMAC/s": products / found["seconds"] / 1e9,
                    "cycles": found["seconds"] * clock * threads / (rows * cols / 64),
                    "limit": named,
                    "share": by[named] / found["seconds"],
                    "seconds by": by,
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = [level for level in kernels.LEVELS if level in PRODUCTS]
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["130m", "1.4b"])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--levels", nargs="+", choices=here, default=here)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    if not (options.table or options.write):
        most = {threads: limits(threads, options.levels) for threads in options.threads}
        found: dict[str, Any] = {
            "machine": {"cpu": cpu(), "cores": os.cpu_count(), "torch": torch.__version__},
            "limits": most,
            "cells": [],
        }
        for cell in cells(options, most):
            found["cells"].append(cell)
            print(roofline_page.line(cell), flush=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    tables = roofline_page.tables(json.loads(options.json.read_text()))
    if options.write:
        page = options.write
        page.write_text(peers_table.put(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    if options.table:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
