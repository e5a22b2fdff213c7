"""What share of `sparsessm prune` is measuring: seconds of the processor for pruning the shape of mamba-130m
(random weights, random tokens) and for one perplexity; a run takes two, before and after.

    OMP_NUM_THREADS=1 python bench/measuring.py --windows 16x1024 --windows 16x2048

Every perplexity is measured once for each round, in turn; printed is the least of the rounds. Options:
--layers N (24), --samples N (4) and --length L (512) of the calibration, --windows WxL, --rounds N (1),
--no-prune.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from bench import cpu, model
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.evaluation.perplexity import perplexity
from sparsessm.pruning import make_plan
from sparsessm.recipe.recipe import Recipe


def random_tokens(windows: int, length: int) -> Tensor:
    return torch.randint(50280, (windows, length), generator=torch.Generator().manual_seed(0))


def seconds(run: Callable[[], object]) -> float:
    """User and system time of all threads: on a busy machine it moves less than the clock."""
    start = time.process_time()
    run()
    return time.process_time() - start


def shape(text: str) -> tuple[int, int]:
    windows, length = text.split("x")
    return int(windows), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=shape, action="append", metavar="WxL")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-prune", action="store_true")
    options = parser.parse_args()
    dense = model(options.layers)
    print(f"{cpu()}, {torch.get_num_threads()} threads, {options.layers} layers", flush=True)
    measured: dict[tuple[int, int], list[float]] = {each: [] for each in options.windows or [(16, 1024)]}
    for _ in range(options.rounds):
        for each, taken in measured.items():
            tokens = random_tokens(*each)
            taken.append(seconds(lambda tokens=tokens: perplexity(dense, tokens, n_bytes=1)))
    for (windows, length), taken in measured.items():
        print(f"perplexity of {windows} windows of {length} tokens: {min(taken):.1f} s", flush=True)
    if options.no_prune:
        return
    recipe = Recipe().resolved(model="random", trained_length=options.length)
    calibration = random_tokens(options.samples, options.length)
    architecture = adapt(dense)
    plan = make_plan(recipe, architecture)
    pruning = seconds(lambda: plan.run(architecture, calibration))
    print(f"pruning by {options.samples} windows of {options.length} tokens: {pruning:.1f} s")
    for (windows, length), taken in measured.items():
        share = 2 * min(taken) / (2 * min(taken) + pruning)
        print(f"measuring {windows} x {length} before and after: {100 * share:.0f} % of both")


if __name__ == "__main__":
    main()
