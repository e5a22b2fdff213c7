"""How long a run will take on this machine, and how much memory and disk: what `--dry-run` says of its cost.

One block of each kind is looked at and solved as in a run, on a few windows of random hidden states; what
grows with the tokens is scaled. Nothing is changed, no text is read. The backward pass is counted as three
forwards. Whole units are not foretold: how many trials they take is found out in the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsessm.architectures import Architecture, Block
from sparsessm.calibration.journal import Stream, Streams
from sparsessm.calibration.loss import head_losses
from sparsessm.calibration.prices import PRICED_TOKENS
from sparsessm.calibration.walk import opened, through
from sparsessm.methods import Rule
from sparsessm.pruning.entries import solve
from sparsessm.pruning.shares import SURVEY_TOKENS, reduced
from sparsessm.report.cost import time_in_words

WINDOWS, LENGTH = (
    4,
    256,
)  # of random hidden states: enough for products at full speed, seconds for a large block
BACKWARD = 3  # forwards that a backward pass takes, the forward before it among them


@dataclass(frozen=True)
class Forecast:
    """Of one run.

    Attributes:
        seconds: by what is done: "prices", "survey", "blocks", "perplexity".
        memory: bytes at the peak, about. disk: bytes beside the result while it runs, about.
        faster: what would save time, in words, the most first.
    """

    seconds: dict[str, float]
    memory: int
    disk: int
    faster: list[str]


@dataclass
class _Times:
    """Seconds for a block: a token for the first three. `look`: with the pass that hands the windows on."""

    look: float = 0.0
    survey: float = 0.0
    forward: float = 0.0
    solve: float = 0.0
    open: float = 0.0


def forecast(
    architecture: Architecture,
    rules: Mapping[str, Rule],
    samples: int,
    length: int,
    *,
    measured: int,
    resident: int,
) -> Forecast:
    """What pruning entries by these rules will take.

    Args:
        architecture: of the model, which is not changed.
        rules: target name -> how it is pruned.
        samples, length: of the calibration windows.
        measured: tokens that perplexity is measured on, twice. resident: bytes of this process now.
    """
    tokens = samples * length
    paired = any(rule.paired for rule in rules.values())
    watches = any(rule.method.watch for rule in rules.values())
    kinds = _kinds(architecture)
    looking = 0.0
    seconds = {"prices": 0.0, "survey": 0.0, "blocks": 0.0, "perplexity": 0.0}
    width = architecture.embed(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    head = _head_seconds(architecture, width)
    surveyed = any(rule.allocation[0].watch for rule in rules.values())
    priced = any(rule.price == "fisher" for rule in rules.values())
    few, fewer = min(tokens, SURVEY_TOKENS), min(tokens, PRICED_TOKENS)
    for block, count in kinds:
        took = _probe(architecture, block, rules, width, paired)
        looking += count * took.look * tokens * watches
        seconds["blocks"] += count * (took.solve + took.open)
        seconds["survey"] += count * (took.survey * few + took.open) * surveyed
        groups = -(-fewer // 2048)
        seconds["prices"] += count * ((1 + BACKWARD) * took.forward * fewer + 2 * groups * took.open) * priced
        seconds["perplexity"] += 2 * count * (took.forward * measured + took.open * bool(measured))
    seconds["prices"] += (1 + BACKWARD) * head * fewer * priced
    seconds["perplexity"] += 2 * head * measured
    seconds["blocks"] += looking
    saved = {
        f"half of the samples ({samples // 2})": looking / 2,
        "--price none": seconds["prices"],
        "--allocation uniform": seconds["survey"],
        "--no-eval": seconds["perplexity"],
    }
    least = sum(seconds.values()) / 20
    faster = [
        f"{what} saves about {time_in_words(time)}"
        for what, time in sorted(saved.items(), key=lambda item: -item[1])
        if time > least
    ]
    states = 4 * tokens * width * (1 + paired) if watches else 0
    return Forecast(
        {name: round(value, 1) for name, value in seconds.items()},
        resident
        + _sums(architecture, rules)
        + _block_bytes(architecture) * (1 + paired)
        + _kept_bytes(architecture, tokens) * watches,
        2 * states + sum(2 * p.numel() for block in architecture.blocks for p in block.layer.parameters()),
        faster,
    )


def _kinds(architecture: Architecture) -> list[tuple[Block, int]]:
    """One block of each kind, from the middle of its like, and how many there are."""
    found: dict[Any, list[Block]] = {}
    for block in architecture.blocks:
        shapes = tuple((name, tuple(p.shape)) for name, p in block.layer.named_parameters())
        found.setdefault(shapes, []).append(block)
    return [(alike[len(alike) // 2], len(alike)) for alike in found.values()]


def _probe(
    architecture: Architecture, block: Block, rules: Mapping[str, Rule], width: int, paired: bool
) -> _Times:
    """What one block takes; as much is watched as in a run."""
    took = _Times()
    tokens = WINDOWS * LENGTH
    random = torch.Generator().manual_seed(0)
    states = torch.randn(WINDOWS, LENGTH, width, generator=random)

    def clock(work: Callable[[], Any]) -> tuple[float, Any]:
        began = time.perf_counter()
        done = work()
        return time.perf_counter() - began, done

    used = architecture.compute.used
    took.open, _ = clock(lambda: architecture.residence.open(block))
    try:
        with block.computing(used):
            through(block, states)  # the first time memory is made
            seconds, _ = clock(lambda: through(block, states))
        took.forward = seconds / tokens
        here = [target for target in block.targets if target.name in rules and not target.uses]
        alone = {t.name: replace(rules[t.name], repair="none") for t in here}
        watched = {
            target.kind: observer
            for target in here
            if (look := rules[target.name].allocation[0].watch)
            and (observer := look(target.matrix, alone[target.name])) is not None
        }
        streams = Streams(architecture.residence, Stream("probe", [states.clone()]), compute=used)
        if watched:
            with opened(block, streams, (), None) as stop:
                seconds, _ = clock(lambda: stop.run(watched))
            took.survey = seconds / tokens
            for target in here:
                if target.kind in watched:
                    seen = watched[target.kind].result()
                    seconds, _ = clock(lambda t=target, s=seen: reduced(t, alone[t.name], s))
                    took.solve += seconds
        streams = Streams(
            architecture.residence, Stream("probe", [states.clone()]), compute=used, keeping=True
        )
        if paired:
            streams.dense = Stream("dense", [states.clone()])
        with opened(block, streams, (), None) as stop:
            for target in here:
                rule, seen = rules[target.name], None
                if rule.method.watch:
                    if target.routed:
                        continue  # experts are watched together; the pass is counted with the others
                    observer = rule.method.watch(target.matrix, rule)
                    seconds, seen = clock(lambda t=target, o=observer: stop.look(t, o))
                    took.look += seconds / tokens
                seconds, _ = clock(lambda t=target, r=rule, s=seen: solve(t, r, s))
                took.solve += seconds
            seconds, _ = clock(stop.advance)
            took.look += seconds / tokens
    finally:
        architecture.residence.close(block)
    return took


def _head_seconds(architecture: Architecture, width: int) -> float:
    """Of the loss, a token."""
    states, tokens = torch.randn(1, LENGTH, width), torch.zeros(1, LENGTH, dtype=torch.int64)
    began = time.perf_counter()
    head_losses(architecture, states, tokens)
    return (time.perf_counter() - began) / LENGTH


def _block_bytes(architecture: Architecture) -> int:
    return max(sum(4 * p.numel() for p in block.layer.parameters()) for block in architecture.blocks)


def _sums(architecture: Architecture, rules: Mapping[str, Rule]) -> int:
    """The Hessian of the matrix with the most inputs, what is made of it, and the matrix a few times."""
    found = 0
    for target in architecture.targets:
        if (rule := rules.get(target.name)) and rule.method.hessian:
            rows, columns = target.matrix.shape
            found = max(found, (8 * (1 + rule.paired) + 16) * columns**2 + 24 * rows * columns)
    return found


def _kept_bytes(architecture: Architecture, tokens: int) -> int:
    """Of results inside a mixer (`architectures/kept.py`): some four values a token and channel."""
    channels = max((target.matrix.shape[1] for target in architecture.targets if target.plain), default=0)
    return min(architecture.residence.spare(), 16 * tokens * channels)
