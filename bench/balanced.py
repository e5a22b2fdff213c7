"""What a stock Mamba-2 loses by keeping states instead of the best directions, and as many in every layer.

    python bench/balanced.py

With one decay a head any change of basis of the states commutes with the scan, so the best r directions
(balanced truncation, docs/structured.md) can replace the N states, but not in stock weights: B and C come out
of a convolution and a SiLU, and the number of states is one for all layers. Here all is computed in memory,
with nothing else repaired, and held-out perplexity is measured: coordinates chosen by GHOST and by `exact`,
those with mixed readouts (no stock weights either), and the balanced projection; each with the same number in
every layer, and with the numbers that method `balanced` gives them. Options: --model, --samples, --windows,
--json FILE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench import cpu
from torch import Tensor

import sparsessm
from sparsessm.architectures import adapt, mamba2
from sparsessm.architectures.stack import StackBlock
from sparsessm.calibration.slabs import slab_width
from sparsessm.calibration.walk import walk
from sparsessm.data.texts import evaluation_windows
from sparsessm.evaluation.perplexity import difference, perplexity
from sparsessm.methods.balanced import balanced_truncation, energies
from sparsessm.methods.exact import elimination_scores
from sparsessm.methods.observers import StateMoments, StateSums
from sparsessm.pruning.projection import allot

SHARES = (0.25, 0.5, 0.75)
Maps = list[tuple[Tensor, Tensor]]  # of each layer T_b and T_c, (G, N, r)


def coordinates(sums: StateSums, r: int, by: str) -> Tensor:
    """(G, r) int64, the states that stay."""
    states = sums.energy.shape[-1]
    if by == "ghost":
        return sums.energy.topk(r, -1).indices.sort(-1).values
    scores = torch.stack([elimination_scores(g[None], states, states - r)[0] for g in sums.gram])
    return scores.topk(r, -1).indices.sort(-1).values


def kept(sums: StateSums, r: int, by: str, mixed: bool) -> tuple[Tensor, Tensor]:
    states, chosen = sums.energy.shape[-1], coordinates(sums, r, by)
    select = torch.eye(states, dtype=torch.float64)[chosen].mT  # (G, N, r)
    if not mixed:
        return select, select
    p = sums.states @ select  # (G, N, r)
    inner = select.mT @ p
    added = (
        1e-6 * inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(r, dtype=torch.float64)
    )
    return select, torch.linalg.solve(inner + added, p.mT).mT


KINDS = {
    "GHOST's states": lambda sums, r: kept(sums, r, "ghost", False),
    "exact's states": lambda sums, r: kept(sums, r, "exact", False),
    "exact's states, readouts mixed": lambda sums, r: kept(sums, r, "exact", True),
    "balanced projection": lambda sums, r: tuple(part.mT for part in balanced_truncation(sums, r)),
}


@contextmanager
def projected(maps: Maps) -> Iterator[None]:
    """Every layer's B and C go through its maps meanwhile."""
    forward, scan = StackBlock.forward, mamba2.ssd_scan
    now: list[int] = [0]

    def through(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] = self.index
        return forward(self, *args, **kwargs)

    def smaller(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **more: Any) -> Any:
        t_b, t_c = maps[now[0]]
        B, C = (torch.einsum("wtgn,gnr->wtgr", x, t) for x, t in ((B, t_b), (C, t_c)))
        return scan(u, delta, A, B.contiguous(), C.contiguous(), *rest, **more)

    StackBlock.forward, mamba2.ssd_scan = through, smaller  # type: ignore[method-assign]
    try:
        yield
    finally:
        StackBlock.forward, mamba2.ssd_scan = forward, scan  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:pycode2")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--json", type=Path, default=Path("build/balanced.json"))
    options = parser.parse_args()
    checkpoint = sparsessm.load(options.model)
    length = checkpoint.trained_length
    tokens = sparsessm.Run(checkpoint, samples=options.samples).windows()
    assert tokens is not None
    architecture = adapt(checkpoint.model, checkpoint.stored)
    sums = []
    for stop in walk(architecture, tokens):
        moments = StateMoments(min(16, slab_width(tokens.shape[1])))
        stop.run({"states": moments})
        sums.append(moments.result())
    text = evaluation_windows("stdlib", checkpoint.tokenizer, length=length, limit=options.windows)
    dense = perplexity(checkpoint.model, *text)
    states = architecture.states
    print(
        f"| change of perplexity in % | {' | '.join(f'{share:.0%} of the states gone' for share in SHARES)} |"
    )
    print("|---|" + "---|" * len(SHARES), flush=True)
    record: dict[str, Any] = {"cpu": cpu(), "model": options.model, "dense": dense.perplexity, "runs": {}}
    shared = [energies(layer) for layer in sums]
    for name, kind in KINDS.items():
        for where in ("", ", by layer"):
            cells = []
            for share in SHARES:
                mean = round(states * (1 - share))
                counts = allot(shared, mean) if where else [mean] * len(sums)
                pairs = zip(sums, counts, strict=True)
                maps = [tuple(part.float() for part in kind(layer, count)) for layer, count in pairs]
                with projected(maps):  # type: ignore[arg-type]
                    change = difference(dense, perplexity(checkpoint.model, *text))
                cells.append(f"{100 * change.mean:+.2f}")
                record["runs"][f"{name}{where}, {share}"] = change.mean
            print(f"| {name}{where} | {' | '.join(cells)} |", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
