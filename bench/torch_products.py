"""Products of torch with the matrices of a real shape: float32, bfloat16, and half of them as CSR.

    python bench/torch_products.py --shape 130m --threads 1

Milliseconds of one product, for one row of inputs and for 512, and the median of the per-round ratios to
float32; the variants run in turn, after a round that does not count. Options: --rounds N (3), --json FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench import cpu, interleaved, milliseconds, ratio
from runtime import SHAPES
from torch.nn import functional as F

SPARSITY = 0.5
COLD = 256 * 2**20  # bytes of bf16 weights that a decode-like product walks through: no cache holds them
WARM = 4  # matrices that a prompt-like product takes in turn: it is bound by arithmetic
Variants = dict[str, Callable[[], None]]


def pruned(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """CSR with 32-bit indices: faster here than torch's 64-bit default."""
    csr = (weight * (torch.rand(weight.shape, generator=generator) >= SPARSITY)).to_sparse_csr()
    return torch.sparse_csr_tensor(
        csr.crow_indices().int(), csr.col_indices().int(), csr.values(), size=tuple(weight.shape)
    )


def products(rows: int, columns: int, batch: int, layers: int) -> tuple[int, Variants]:
    """Products of `batch` rows with copies of a matrix that stand for the layers of the model; how many."""
    copies = min(layers, math.ceil(COLD / (2 * rows * columns)) if batch == 1 else WARM)
    generator = torch.Generator().manual_seed(0)
    weights = [0.02 * torch.randn(rows, columns, generator=generator) for _ in range(copies)]
    halves = [weight.bfloat16() for weight in weights]
    sparse = [pruned(weight, generator) for weight in weights]
    x = torch.randn(batch, columns, generator=generator)
    half, upright = x.bfloat16(), x.T.contiguous()  # CSR takes columns

    def over(matrices: list[torch.Tensor], product: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            for matrix in matrices:
                product(matrix)

        return run

    return copies, {
        "float32": over(weights, lambda weight: F.linear(x, weight)),
        "bfloat16": over(halves, lambda weight: F.linear(half, weight)),
        "CSR": over(sparse, lambda weight: weight @ upright),
    }


def measured(shape: str, rounds: int) -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
    """By the name of the product: milliseconds of each variant, and how many times those of float32."""
    width, layers = SHAPES[shape]
    for name, rows, columns in (("in_proj", 4 * width, width), ("out_proj", width, 2 * width)):
        for batch in (1, 512):
            copies, variants = products(rows, columns, batch, layers)
            times = interleaved(rounds, **variants)
            each = {key: [second / copies for second in seconds] for key, seconds in times.items()}
            found = {
                key: (ms, round(ratio(times, key, "float32"), 2)) for key, ms in milliseconds(each).items()
            }
            yield f"{name} {rows} x {columns}, {batch} {'row' if batch == 1 else 'rows'}", found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="130m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse ")  # torch on its CSR: in beta, invariants unchecked
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"cpu": cpu(), "threads": options.threads, "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in results.items()))
    with torch.inference_mode():
        for title, found in measured(options.shape, options.rounds):
            results[title] = found
            cells = (f"{name} {ms:.3f} ms (x {times:.2f})" for name, (ms, times) in found.items())
            print(f"{title}: " + ", ".join(cells), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
