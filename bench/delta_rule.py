"""The gated delta rule over time: native steps beside chunks of plain torch, at the shape of Qwen3.5-0.8B's
layers (16 heads, keys and values of 128 channels), one decay for each head and one for each channel.

    python bench/delta_rule.py --json bench/results/delta_rule.json

Variants are interleaved round by round and compared by the median of their per-round ratios: machines drift.
Options: --length T, --rounds N, --threads N.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import cpu, interleaved, milliseconds, ratio, show
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.kernels.delta import energies, gated_delta
from sparsessm.kernels.delta_chunked import delta_chunked, energies_chunked

HEADS, WIDTH = 16, 128


def inputs(length: int, *, channels: bool) -> list[Tensor]:
    """q, k, v, g and beta of one sequence."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(1, length, HEADS, WIDTH), dim=-1) for _ in range(2))
    g = -F.softplus(torch.randn(1, length, HEADS, *([WIDTH] if channels else [])))
    return [q, k, torch.randn(1, length, HEADS, WIDTH), g, torch.rand(1, length, HEADS)]


def learned(rule: Callable[..., tuple[Tensor, Tensor]], x: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward, in every input."""
    x = [part.clone().requires_grad_() for part in x]
    return lambda: torch.autograd.grad(rule(*x)[0].sum(), x)


def measured(length: int, rounds: int, *, channels: bool) -> dict[str, Any]:
    """Milliseconds and ratios of forward, forward with backward, and norms of the states."""
    x = inputs(length, channels=channels)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (lambda: delta_chunked(*x), lambda: gated_delta(*x)),
        "forward and backward": (learned(delta_chunked, x), learned(gated_delta, x)),
        "norms of the states": (lambda: energies_chunked(*x[1:]), lambda: energies(*x[1:])),
    }
    found: dict[str, Any] = {}
    for name, (chunked, native) in pairs.items():
        times = interleaved(rounds, chunks=chunked, native=native)
        faster = round(ratio(times, "chunks", "native"), 2)
        found[name] = {"milliseconds": milliseconds(times), "times as fast": faster}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = {"cpu": cpu(), "level": kernels.LEVEL, "threads": options.threads, "length": options.length}
    found: dict[str, Any] = {"where": where}
    for name, channels in (("a decay for each head", False), ("a decay for each channel", True)):
        found[name] = measured(options.length, options.rounds, channels=channels)
        show(name, found[name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
