"""Snapshots of a running model: what it carries after a prompt, in a few numbers for each layer.

Place in the flow: between an engine of the runtime and `drift.py`. A state space model's state says what it
has read: of each layer the size of the last inputs of the convolution, how far they point where they usually
do, and the energy of its states. Beside them stands the entropy of what comes next, and, where a text is
read to be judged (not while it is served), how surprising its tokens were. A snapshot reads a state once; the
model does no work for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsessm.calibration.progress import Progress, Steps
from sparsessm.checkpoint.companions import FINGERPRINT
from sparsessm.checkpoint.files import read_one, write_one
from sparsessm.data.texts import evaluation_windows
from sparsessm.runtime.generation import Model

from .drift import BLOCKS, LEAST, Fingerprint, Judged

FILE = FINGERPRINT  # in the directory of a result
FORMAT = "sparsessm fingerprint 1"
WINDOWS, LONGEST, SHORTEST = 512, 256, 32  # snapshots of a reference, tokens that are read before one
SURPRISE = "surprise"  # nats a token
FEWEST = BLOCKS[0]  # prompts that can be judged
LEARNT = 64  # windows that say where inputs usually point


class Snapshots:
    """Takes snapshots of one model's states.

    Attributes:
        names: of the features, in their order; a layer is one with a mixer.
    """

    def __init__(self, model: Model, directions: Sequence[np.ndarray] | None = None) -> None:
        """
        Args:
            directions: of a fingerprint; None: it is being made.
        """
        self.sections = model.engine.sections
        self._sizes = [size for pair in self.sections for size in pair]
        self.directions = (
            None if directions is None else [torch.from_numpy(one).float() for one in directions]
        )
        layers = range(len(self.sections))
        self.names = (
            *(f"layer {i} size of inputs" for i in layers),
            *(f"layer {i} direction of inputs" for i in layers),
            *(f"layer {i} energy of states" for i in layers),
            "entropy",
            SURPRISE,
        )

    @property
    def online(self) -> tuple[str, ...]:
        """Features that cost nothing while a model is served."""
        return self.names[:-1]

    def inputs(self, state: Tensor) -> list[Tensor]:
        """Of each layer the last inputs of the convolution."""
        return list(self._split(state)[::2])

    def _split(self, state: Tensor) -> tuple[Tensor, ...]:
        """What the mixers have of a state; that of a model with attention goes on behind it."""
        return state[: sum(self._sizes)].split(self._sizes)

    def take(self, state: Tensor, logits: Tensor, surprise: float = 0.0) -> np.ndarray:
        """(F,) float32 of a state (n,) and the logits (V,) after it."""
        assert self.directions is not None
        parts = self._split(state)
        sizes = torch.stack([part.norm() if part.numel() else torch.tensor(0.0) for part in parts])
        counts = torch.tensor([max(size, 1) for size in self._sizes]).sqrt()
        logged = torch.log(sizes / counts + 1e-6)
        pairs = zip(parts[::2], self.directions, sizes[::2], strict=True)
        turned = torch.stack([part @ one / (size + 1e-6) for part, one, size in pairs])
        logprobs = torch.log_softmax(logits.float(), -1)
        entropy = -(logprobs.exp() * logprobs).sum()
        last = torch.stack([entropy, torch.tensor(surprise)])
        return torch.cat([logged[::2], turned, logged[1::2], last]).numpy()


def read(model: Model, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Read a prompt (L,) from the beginning: the state, the logits (V,) after it, mean surprise in nats."""
    state = model.engine.keys.room(model.engine.new_state(1)[0], len(ids))
    logits = model.engine.prompt(ids, state, every=True)
    logprobs = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])
    return state, logits[-1], -float(logprobs.mean())


def lengths(count: int) -> list[int]:
    """How many tokens of each window are read: prompts have many lengths, from `SHORTEST` to `LONGEST`."""
    steps = np.geomspace(SHORTEST, LONGEST, 7).round().astype(int)
    return [int(steps[(3 * i) % len(steps)]) for i in range(count)]


def learn(model: Model, data: str, *, column: str | None = None, windows: int = WINDOWS) -> Fingerprint:
    """The fingerprint of a model on a text's held-out part.

    Args:
        data, column: as of `evaluation_windows`. windows: snapshots, evenly spaced over the text.

    Raises:
        ValueError: a text with fewer than `LEAST` windows of `LONGEST` tokens; else as `evaluation_windows`.
    """
    tokens, _ = evaluation_windows(data, model.tokenizer, length=LONGEST, limit=windows, column=column)
    if len(tokens) < LEAST:
        raise ValueError(f"{data} has {len(tokens)} windows of {LONGEST} tokens; a fingerprint needs {LEAST}")
    maker = Snapshots(model)
    sums = [torch.zeros(pair[0]) for pair in maker.sections]
    for ids in tokens[:: max(1, len(tokens) // LEARNT)]:
        state, _, _ = read(model, ids)
        for total, part in zip(sums, maker.inputs(state), strict=True):
            total += part / (part.norm() + 1e-6)
    # as they are stored: a fingerprint that was read again judges alike
    directions = [(total / (total.norm() + 1e-6)).half().float().numpy() for total in sums]
    maker = Snapshots(model, directions)
    many = lengths(len(tokens))
    features = [maker.take(*read(model, ids[:count])) for ids, count in zip(tokens, many, strict=True)]
    about = {"data": data, "layout": model.engine.layout, "windows": len(tokens)}
    return Fingerprint(maker.names, np.stack(features), np.array(many), tuple(directions), about)


def save(fingerprint: Fingerprint, path: str | os.PathLike[str]) -> None:
    """Write a fingerprint; it appears whole and replaces an older one.

    Raises:
        ValueError: it cannot be written.
    """
    tensors = {"features": torch.from_numpy(fingerprint.features).float()}
    tensors["lengths"] = torch.from_numpy(fingerprint.lengths)
    directions = enumerate(fingerprint.directions)
    tensors |= {f"direction.{i}": torch.from_numpy(one).half() for i, one in directions}
    notes = {"format": FORMAT, "names": json.dumps(fingerprint.names), "about": json.dumps(fingerprint.about)}
    write_one(Path(path), tensors, notes)


def load(path: str | os.PathLike[str], model: Model) -> Fingerprint:
    """Read what `save` wrote, and check that it is of this model.

    Raises:
        ValueError: there is none, it is damaged, or it is of another model.
    """
    if not Path(path).exists():
        raise ValueError(
            f"{path} does not exist; `sparsessm watch {Path(path).parent} --learn` writes a fingerprint"
        )
    tensors, notes = read_one(Path(path))
    if notes.get("format") != FORMAT:
        raise ValueError(f"{path}: not a fingerprint (format: {notes.get('format', 'none')})")
    try:
        names, about = json.loads(notes["names"]), json.loads(notes["about"])
        features, count = tensors["features"].numpy(), tensors["lengths"].numpy()
        directions = tuple(
            tensors[f"direction.{i}"].float().numpy() for i in range(len(model.engine.sections))
        )
        fits = features.shape == (len(count), len(names)) and bool((count > 0).all())
        fits &= [len(one) for one in directions] == [pair[0] for pair in model.engine.sections]
        fits &= tuple(names) == Snapshots(model).names
        layout = about["layout"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: a damaged fingerprint ({error!r})") from error
    if layout != model.engine.layout or not fits:
        raise ValueError(f"{path}: it is of another model; make it again with --learn")
    return Fingerprint(tuple(names), features, count, directions, about)


def pieces(model: Model, texts: Sequence[str]) -> Iterator[Tensor]:
    """Each text as prompts: its tokens, cut where they are longer than `LONGEST`; what is shorter than
    `SHORTEST` says too little and is left out."""
    for text in texts:
        for part in torch.tensor(model.encode(text), dtype=torch.int64).split(LONGEST):
            if len(part) >= SHORTEST:
                yield part


def judged(
    model: Model, fingerprint: Fingerprint, prompts: Sequence[Tensor], progress: Progress | None = None
) -> dict[str, Any]:
    """All prompts of a text in their order, with all features; plain values.

    Args:
        progress: called with (stage, done, total, block).
    """
    snapshots, watch = Snapshots(model, fingerprint.directions), fingerprint.detector().watch()
    steps, found = Steps("prompts", len(prompts), progress), dict[int, list[Judged]]()
    for ids in prompts:
        for one in watch.add(snapshots.take(*read(model, ids)), len(ids)):
            found.setdefault(one.block, []).append(one)
        steps()
    rows = []
    for block, some in sorted(found.items()):
        worst = max(some, key=lambda one: one.score)
        alarms = sum(one.alarm for one in some)
        row = {"block": block, "blocks": len(some), "alarms": alarms, "largest": worst.score}
        rows.append({**row, "strangest": worst.where})
    reference = str(fingerprint.about.get("data"))
    return {"prompts": watch.seen, "reference": reference, "alarm": watch.alarms > 0, "judged": rows}


def cost(pruned: Model, dense: Model, prompts: Sequence[Tensor]) -> dict[str, Any]:
    """What pruning costs on these prompts: the mean difference of surprise in nats a token over prompts, and
    the rise of perplexity with its 95 % interval.

    Raises:
        ValueError: the two do not have the same vocabulary.
    """
    if pruned.engine.vocabulary != dense.engine.vocabulary:
        sizes = pruned.engine.vocabulary, dense.engine.vocabulary
        raise ValueError(f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens")
    gaps = np.array([read(pruned, ids)[2] - read(dense, ids)[2] for ids in prompts])
    mean = float(gaps.mean())
    error = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else float("nan")
    low, high = (float(np.expm1(mean + side * 1.96 * error)) for side in (-1, 1))
    return {"prompts": len(gaps), "nats": mean, "increase": float(np.expm1(mean)), "low": low, "high": high}
