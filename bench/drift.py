"""What `sparsessm watch` finds and what it misses: false alarms on usual text, alarms on real shifts.

    python bench/drift.py DIR --shared FOLDER [--json FILE] [--plot FILE]

DIR is a result that was pruned for `stdlib`; its fingerprint is made anew, on some of the held-out windows.
The others are the usual text. FOLDER has wikitext2.test.raw.txt, warandpeace.txt and tinystories_sample.txt.
Streams of prompts are drawn from the usual text, from another text, or from both; `alarm after` is the median
number of prompts until the first alarm over `--draws` streams, none of them longer than `--most`. In growing
streams the other text's share rises evenly from nothing to all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsessm import runtime
from sparsessm.data.texts import evaluation_windows
from sparsessm.report import machine
from sparsessm.studies import drift, traffic

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
MODES = {"text": "all features (`watch --data`)", "served": "without surprise (`serve --watch`)"}


def cut(ids: Sequence[Tensor]) -> list[Tensor]:
    """Prompts of the lengths that a fingerprint has."""
    return [one[:count] for one, count in zip(ids, traffic.lengths(len(ids)), strict=True)]


def taken(model: Any, snapshots: traffic.Snapshots, prompts: Sequence[Tensor]) -> list[tuple[Any, int]]:
    return [(snapshots.take(*traffic.read(model, ids)), len(ids)) for ids in prompts]


def whole(model: Any, text: str, count: int, draw: random.Random) -> list[Tensor]:
    """Windows of a text, in random order."""
    ids = torch.tensor(model.encode(text[:3_000_000]))
    windows = [one for one in ids.split(traffic.LONGEST) if len(one) == traffic.LONGEST]
    draw.shuffle(windows)
    return windows[:count]


def shifts(model: Any, folder: Path, usual: Sequence[Tensor], draw: random.Random) -> dict[str, list[Tensor]]:
    """Other texts, from far to near."""
    texts = {
        "random bytes": "".join(chr(draw.randrange(32, 127)) for _ in range(400_000)),
        "War and Peace": (folder / "warandpeace.txt").read_text(),
        "WikiText-2": (folder / "wikitext2.test.raw.txt").read_text(),
        "TinyStories": (folder / "tinystories_sample.txt").read_text(),
    }
    found = {name: whole(model, text, 400, draw) for name, text in texts.items()}
    python = [model.decode(ids.tolist()) for ids in usual]
    lines = [line for text in python for line in text.splitlines(keepends=True)]
    draw.shuffle(lines)
    found["Python, lines shuffled"] = whole(model, "".join(lines), 400, draw)
    flat = "".join(line.lstrip() for text in python for line in text.splitlines(keepends=True))
    found["Python, not indented"] = whole(model, flat, 400, draw)
    return found


def first_alarm(detector: drift.Detector, stream: Sequence[tuple[Any, int]]) -> int | None:
    """Prompts until the first alarm."""
    watch = detector.watch()
    for snapshot, length in stream:
        if any(judged.alarm for judged in watch.add(snapshot, length)):
            return watch.seen
    return None


def drawn(
    usual: Sequence[Any], other: Sequence[Any], shares: Sequence[float], draw: random.Random
) -> list[Any]:
    """A stream with so much of the other text at each of its prompts."""
    return [draw.choice(other) if draw.random() < share else draw.choice(usual) for share in shares]


def summed(delays: Sequence[int | None]) -> dict[str, Any]:
    """Of streams: in how many there was an alarm, and after how many prompts, the median."""
    median = statistics.median(one or 10**9 for one in delays)
    found = sum(one is not None for one in delays) / len(delays)
    return {"found": found, "alarm_after": median if median < 10**9 else None}


def growing(
    detector: drift.Detector, usual: list[Any], others: dict[str, list[Any]], draws: int, most: int
) -> dict[str, Any]:
    """The same of streams whose share of the other text rises evenly, by text."""
    draw, shares = random.Random(6), [i / most for i in range(most)]
    return {
        name: summed([first_alarm(detector, drawn(usual, other, shares, draw)) for _ in range(draws)])
        for name, other in others.items()
    }


def false_alarms(detector: drift.Detector, usual: list[tuple[Any, int]], draws: int) -> dict[str, Any]:
    """Of blocks of the usual text: in its order, from every start, and drawn at random."""
    count, found = len(usual), {}
    rows = [detector.take(*one) for one in usual]
    draw = random.Random(5)
    for block in drift.BLOCKS:
        ordered = [[rows[(start + i) % count] for i in range(block)] for start in range(0, count, 2)]
        mixed = [draw.sample(rows, block) if block <= count else rows for _ in range(draws)]
        for name, blocks in (("in order", ordered), ("at random", mixed)):
            alarms = sum(detector.judge(drift.np.stack(some)).alarm for some in blocks)
            found[f"{block}, {name}"] = {"blocks": len(blocks), "alarms": alarms}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=25)
    parser.add_argument("--most", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    model, draw = runtime.load(options.directory), random.Random(0)
    fingerprint = traffic.learn(model, "stdlib")
    known, _ = evaluation_windows("stdlib", model.tokenizer, length=traffic.LONGEST, limit=traffic.WINDOWS)
    every, _ = evaluation_windows("stdlib", model.tokenizer, length=traffic.LONGEST)
    seen = {tuple(ids.tolist()) for ids in known}
    fresh = [ids for ids in every if tuple(ids.tolist()) not in seen]
    snapshots = traffic.Snapshots(model, fingerprint.directions)
    usual = taken(model, snapshots, cut(fresh))
    texts = shifts(model, options.shared, fresh, draw)
    others = {name: taken(model, snapshots, cut(ids)) for name, ids in texts.items()}
    found: dict[str, Any] = {"machine": machine.current(), "usual": len(usual), "modes": {}}
    for mode, features in (("text", None), ("served", snapshots.online)):
        detector = fingerprint.detector(features)
        table: dict[str, dict[str, Any]] = {}
        for name, other in {"usual text": usual, **others}.items():
            for share in (1.0,) if name == "usual text" else (1.0, *SHARES):
                streams = (drawn(usual, other, [share] * options.most, draw) for _ in range(options.draws))
                row = summed([first_alarm(detector, stream) for stream in streams])
                table.setdefault(name, {})[f"{share:g}"] = row
            print(mode, name, json.dumps(table[name]), flush=True)
        found["modes"][mode] = {
            "false": false_alarms(detector, usual, 1000),
            "streams": table,
            "growing": growing(detector, usual, others, options.draws, options.most),
        }
        print(mode, "growing", json.dumps(found["modes"][mode]["growing"]), flush=True)
        print(mode, json.dumps(found["modes"][mode]["false"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)


def plot(found: dict[str, Any], file: Path) -> None:
    """Streams in which the shift was found, by its share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, (mode, title) in zip(both, MODES.items(), strict=True):
        for name, rows in found["modes"][mode]["streams"].items():
            if name != "usual text":
                shares = sorted(rows, key=float)
                values = [100 * rows[share]["found"] for share in shares]
                axis.plot([100 * float(share) for share in shares], values, marker="o", label=name)
        usual = 100 * found["modes"][mode]["streams"]["usual text"]["1"]["found"]
        axis.axhline(usual, color="grey", linestyle=":", label="usual text (false alarms)")
        axis.set(xscale="log", xlabel="% of the prompts from the other text", title=title)
        axis.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    both[0].set_ylabel("% of streams with an alarm")
    both[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
