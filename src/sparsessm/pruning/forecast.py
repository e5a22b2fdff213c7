"""How long a run will take on this machine, and how much memory and disk: what `--dry-run` says of its cost.

One block of each kind is looked at, solved and gone through backwards as in a run, on one full slab of random
hidden states; what grows with the tokens is scaled. What that took of memory at most is what a run takes,
beside what grows with the tokens. Nothing is changed, no text is read. Whole units are not foretold: how many
trials they take is found out in the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Block
from sparsessm.calibration.journal import Stream, Streams
from sparsessm.calibration.loss import head_losses
from sparsessm.calibration.prices import PRICED_TOKENS, block_backward, energy, frozen, head_backward
from sparsessm.calibration.prices import ROWS as PRICED_AT_ONCE
from sparsessm.calibration.slabs import ROWS
from sparsessm.calibration.walk import opened, through
from sparsessm.methods import Rule
from sparsessm.pruning import preview
from sparsessm.pruning.entries import solve
from sparsessm.pruning.shares import SURVEY_TOKENS, reduced
from sparsessm.report.cost import time_in_words

WINDOWS = 16
LENGTH = ROWS // WINDOWS  # of random hidden states: one slab as large as a run's
PROBED = 4096  # rows of a vocabulary that are solved; the others take as long each
BESIDE = 27  # bytes for each of its weights while it is solved, beside the model; measured (dev/LOG.md)


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
    """Seconds for a block: a token for the first four. `look`: with the pass that hands the windows on.
    `reduce`: what the survey makes of its sums."""

    look: float = 0.0
    survey: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    reduce: float = 0.0
    solve: float = 0.0
    open: float = 0.0


def forecast(
    architecture: Architecture,
    rules: Mapping[str, Rule],
    samples: int,
    length: int,
    *,
    measured: int,
    peak: Callable[[], int],
) -> Forecast:
    """What pruning entries by these rules will take.

    Args:
        architecture: of the model, which is not changed.
        rules: target name -> how it is pruned.
        samples, length: of the calibration windows.
        measured: tokens that perplexity is measured on, twice. peak: says the most bytes that this process
            had in memory so far; asked in the end.
    """
    tokens = samples * length
    paired = any(rule.paired for rule in rules.values())
    watches = any(rule.method.watch for rule in rules.values())
    kinds = _kinds(architecture)
    looking = 0.0
    seconds = {"prices": 0.0, "survey": 0.0, "blocks": 0.0, "perplexity": 0.0}
    width = architecture.embed(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    head, head_back = _head_seconds(architecture, width)
    surveyed = any(rule.allocation[0].watch for rule in rules.values())
    priced = any(rule.price == "fisher" for rule in rules.values())
    few, fewer = min(tokens, SURVEY_TOKENS), min(tokens, PRICED_TOKENS)
    for block, count in kinds:
        took = _probe(architecture, block, rules, width, paired, priced)
        looking += count * took.look * tokens * watches
        seconds["blocks"] += count * (took.solve + took.open)
        seconds["survey"] += count * (took.survey * few + took.reduce + took.open) * surveyed
        groups = -(-fewer // PRICED_AT_ONCE)
        through_both = (took.forward + took.backward) * fewer
        seconds["prices"] += count * (through_both + 2 * groups * took.open) * priced
        seconds["perplexity"] += 2 * count * (took.forward * measured + took.open * bool(measured))
    looked, shared, solved, weights = _vocabulary(architecture, rules, width, surveyed)
    looking += looked * tokens
    seconds["survey"] += shared
    seconds["blocks"] += solved
    seconds["prices"] += head_back * fewer * priced
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
    states = 2 * 4 * tokens * width * (1 + paired) if watches else 0  # in two places that take turns
    held = states if architecture.residence.stays(4 * tokens * width) else 0
    kept = _kept_bytes(architecture, tokens) * watches
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    memory = peak() + held + kept + preview.coded(architecture, rules) + BESIDE * weights
    return Forecast(rounded, memory, states + preview.working(architecture, rules), faster)


def _kinds(architecture: Architecture) -> list[tuple[Block, int]]:
    """One block of each kind, from the middle of its like, and how many there are."""
    found: dict[Any, list[Block]] = {}
    for block in architecture.blocks:
        shapes = tuple((name, tuple(p.shape)) for name, p in block.layer.named_parameters())
        found.setdefault(shapes, []).append(block)
    return [(alike[len(alike) // 2], len(alike)) for alike in found.values()]


def _probe(
    architecture: Architecture,
    block: Block,
    rules: Mapping[str, Rule],
    width: int,
    paired: bool,
    priced: bool,
) -> _Times:
    """What one block takes; as much is watched as in a run."""
    took = _Times()
    tokens = WINDOWS * LENGTH
    random = torch.Generator().manual_seed(0)
    states = torch.randn(WINDOWS, LENGTH, width, generator=random)

    def clock(work: Callable[[], Any]) -> tuple[float, Any]:
        began = _now(architecture)
        done = work()
        return _now(architecture) - began, done

    def squared(name: str, grad: Tensor) -> None:
        energy(grad)

    used = architecture.compute.used
    took.open, _ = clock(lambda: architecture.residence.open(block))
    try:
        with block.computing(used):
            through(block, states)  # the first time memory is made
            seconds, _ = clock(lambda: through(block, states))
        took.forward = seconds / tokens
        if priced:
            with frozen(architecture.model):
                seconds, _ = clock(
                    lambda: block_backward(architecture, block, states, torch.ones_like(states), squared)
                )
            took.backward = seconds / tokens
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
                    took.reduce += seconds
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


def _vocabulary(
    architecture: Architecture, rules: Mapping[str, Rule], width: int, surveyed: bool
) -> tuple[float, float, float, int]:
    """Embedding and head where rules hit them: seconds of looking, a token; of what the survey makes of it;
    of solving; and the weights of the larger one."""
    look, shared, solved, weights = 0.0, 0.0, 0.0, 0
    states = torch.randn(WINDOWS, LENGTH, width, generator=torch.Generator().manual_seed(0))
    for target in architecture.tail.targets:
        if (rule := rules.get(target.name)) is None:
            continue
        seen, streams = None, Streams(architecture.residence, Stream("probe", [states.clone()]))
        with opened(architecture.tail, streams, (), None) as stop:
            if rule.method.watch and not target.looked_up:
                began = _now(architecture)
                seen = stop.look(target, rule.method.watch(target.matrix, rule))
                look += (_now(architecture) - began) / states[..., 0].numel()
            began = _now(architecture)
            if surveyed:
                reduced(target, replace(rule, repair="none"), seen)
            between = _now(architecture)
            part = replace(target, parameter=target.matrix[:PROBED])
            solve(part, rule, seen)
            shared += between - began
            solved += (_now(architecture) - between) * target.matrix.numel() / part.matrix.numel()
            weights = max(weights, target.matrix.numel())
    return look, shared, solved, weights


def _head_seconds(architecture: Architecture, width: int) -> tuple[float, float]:
    """Of the loss, and of its gradient, a token."""
    states, tokens = torch.randn(2, LENGTH, width), torch.zeros(2, LENGTH, dtype=torch.int64)
    began = _now(architecture)
    head_losses(architecture, states, tokens)
    between = _now(architecture)
    with frozen(architecture.model):
        head_backward(architecture, states, tokens, None)
    return (between - began) / tokens.numel(), (_now(architecture) - between) / tokens.numel()


def _now(architecture: Architecture) -> float:
    """Seconds, when all that a GPU was asked for is done."""
    if architecture.residence.device.type == "cuda":
        torch.cuda.synchronize(architecture.residence.device)
    return time.perf_counter()


def _kept_bytes(architecture: Architecture, tokens: int) -> int:
    """Of results inside a mixer (`architectures/kept.py`): some four values a token and channel."""
    channels = max((target.matrix.shape[1] for target in architecture.targets if target.plain), default=0)
    return min(architecture.residence.spare(), 16 * tokens * channels)
