"""In which order the targets of a model are looked at: one after the other while they are changed (`visit`),
or all of a block in one pass, as the model is (`survey`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sparsessm.architectures import Architecture, Target
from sparsessm.architectures.experts import abreast, common, reads_stream
from sparsessm.calibration.journal import Forgetful, Stage, Stream
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import share, slab_count
from sparsessm.calibration.walk import Stop, walk
from sparsessm.methods import borrowing
from sparsessm.methods.observers import InputGram, Moments

# A new observer of a target, None: it needs none.
Watch = Callable[[Target], Any | None]
# Looks at targets at which a visit stands: who owns each, by name -> the results of its observers, None where
# the owner is another process; nothing of a target that is not watched.
Look = Callable[[Mapping[str, int]], dict[str, Any]]

# Bytes of Hessians that one pass over experts may sum up: those of 64 matrices with 2048 inputs (of 32 if
# paired); a matrix with 14336 inputs takes a pass of its own.
HELD = 2 << 30


def visit(
    architecture: Architecture,
    names: Collection[str],
    watch: Watch,
    tokens: Tensor | None,
    progress: Progress | None = None,
    *,
    paired: bool = False,
    stage: Stage | None = None,
    note: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[list[Target], Look]]:
    """The targets of these names in the order of the data, with a way to look at them: one at a time, of
    experts as many as one pass can look at, and together those that read the same.

    They see what the targets before them, as the caller left them, make of the windows.

    Args:
        watch: target -> its observer, or None where it can be changed unseen.
        tokens: (W, L) int64 calibration windows; None if nothing is watched.
        progress: called with ("calibrate", slabs done, slabs in all, block).
        paired: carry what the dense model makes of the windows, for observers that compare.
        stage, note: as of `walk`; targets of blocks that were left are passed over.

    Raises:
        ValueError: as `walk`.
    """
    watch, stage = _of_inputs(watch), stage or Forgetful(architecture)
    head = [target for target in architecture.tail.targets if target.name in names]
    watched = {t.name for t in architecture.targets if t.name in names and watch(t) is not None}
    if tokens is None or not watched:
        for stop in walk(architecture, None, tail=True, stage=stage, note=note):
            yield from (([target], lambda _: {}) for target in stop.block.targets if target.name in names)
        return
    dense = Stream.of(architecture, tokens, stage, "dense") if paired else None
    if architecture.tied and head:
        # The head is the embedding too: changed before anything sees its rows, on the dense model's states.
        if architecture.tail.index not in stage.left:
            with architecture.holding(architecture.tail.index):
                yield head[:1], partial(_look_behind, architecture, head[0], watch, tokens, progress)
            stage.leave(architecture.tail, note(), {"dense": 0} if paired else {})
        head = []
    behind = any(target.name in watched for target in head)
    parts = (part for block in architecture.blocks for part in together(block.targets, watch))
    # looks at what blocks share are not counted by `Stop`
    looks = sum(len(_passes([t for t in part if t.name in watched and not t.uses], watch)) for part in parts)
    passes = len(architecture.blocks) + looks + (1 if behind else -1)
    slabs = _slabs(architecture, tokens)
    steps = Steps("calibrate", passes * slabs, progress, len(architecture.blocks))
    if stage.left:
        steps(passes * len(stage.left) // (len(architecture.blocks) + 1) * slabs)
    how: dict[str, Any] = {"dense": dense, "tail": bool(head), "steps": steps, "keeping": True}
    for stop in walk(architecture, tokens, **how, stage=stage, note=note):
        for part in together(stop.block.targets, watch):
            if asked := [target for target in part if target.name in names]:
                yield asked, partial(_look, stop, asked, watch, architecture.ranks.number)
        if stop.block is architecture.blocks[-1] and not behind:
            stop.drop_windows()


def _look(
    stop: Stop, part: Sequence[Target], watch: Watch, number: int, owners: Mapping[str, int]
) -> dict[str, Any]:
    """Look at the targets of one part of a block: at experts, and at what reads the same, in one pass.

    Args:
        number: of this process.
    """
    watched = {target.name: observer for target in part if (observer := watch(target)) is not None}
    if not part[0].routed:
        found = dict[str, Any]()
        for alike in _passes([target for target in part if target.name in watched], watch):
            whose = {owners[target.name] for target in alike}
            seen = stop.look(alike[0], watched[alike[0].name], whose.pop() if len(whose) == 1 else None)
            found |= {t.name: seen if owners[t.name] == number else None for t in alike}
        return found
    kinds = {target.kind: watched[target.name] for target in part if target.name in watched}
    if not kinds:
        return {}
    layer, last = watching_layers(part, watched), list(kinds)[-1]
    if layer and not reads_stream(last):  # what it says is of all experts, whoever is looked at here
        last = [target.kind for target in stop.block.targets if common(target.kind) in layer][-1]
    stop.run({**kinds, **layer}, until=last)
    of_layer, found = lent(stop, layer), stop.results(watched, owners)
    return {t.name: with_layer(t, found[t.name], of_layer) for t in part if t.name in watched}


def _passes(watched: Sequence[Target], watch: Watch) -> list[list[Target]]:
    """Targets of one part of a block, those together that one pass looks at; experts are one."""
    found: dict[Any, list[Target]] = {}
    for target in watched:
        key: Any = "" if target.routed else target.name
        if target.reads and type(observer := watch(target)) is InputGram:
            key = target.reads, observer.paired
        found.setdefault(key, []).append(target)
    return list(found.values())


def watching_layers(targets: Sequence[Target], watched: Mapping[str, Any]) -> dict[str, Any]:
    """What watches all tokens of the layer for those of these targets that are experts'.

    Args:
        watched: target -> its observer.

    Returns:
        By the kind that all experts' matrices have in common.
    """
    kinds: dict[str, list[Any]] = {}
    for target in targets:
        if target.routed and target.name in watched:
            kinds.setdefault(common(target.kind), []).append((target, watched[target.name]))
    found = {}
    for kind, pairs in kinds.items():
        observer = borrowing.of_layer([one for _, one in pairs], reads_stream(pairs[0][0].kind))
        if observer is not None:
            found[kind] = observer
    return found


def lent(stop: Stop, layer: Mapping[str, Any]) -> dict[str, Moments]:
    """What the layer lends to its experts, by their common kind.

    Args:
        layer: what `watching_layers` gave, after a pass.
    """
    seen = stop.results(layer)
    return {kind: borrowing.settled(one, reads_stream(f"{kind}.0")) for kind, one in seen.items()}


def with_layer(target: Target, seen: Any, layer: Mapping[str, Any]) -> Any:
    """What was seen of a target; of an expert with what it borrows of its layer."""
    of_all = layer.get(common(target.kind)) if target.routed else None
    if of_all is None or not isinstance(seen, Moments):
        return seen
    return borrowing.drawn(seen, of_all, target.matrix.shape[1], reads_stream(target.kind))


def _look_behind(
    architecture: Architecture,
    target: Target,
    watch: Watch,
    tokens: Tensor,
    progress: Progress | None,
    owners: Mapping[str, int],
) -> dict[str, Any]:
    """What the model as it is feeds into its head; both streams are the same."""
    blocks, observer = len(architecture.blocks), watch(target)
    if observer is None:
        return {}
    steps = Steps("calibrate", (blocks + 1) * _slabs(architecture, tokens), progress, blocks)
    (found,) = (
        stop.look(target, observer, owners[target.name])
        for stop in walk(architecture, tokens, tail=True, steps=steps)
        if stop.block is architecture.tail
    )
    return {target.name: found}


def _slabs(architecture: Architecture, tokens: Tensor) -> int:
    """That one pass of this process's windows takes."""
    mine = share(architecture.ranks, *tokens.shape)
    return slab_count(mine.stop - mine.start, tokens.shape[1])


def survey(
    architecture: Architecture,
    tokens: Tensor,
    watch: Watch,
    steps: Steps | None = None,
    *,
    stage: Stage | None = None,
    note: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[Target, Any]]:
    """Look at the model as it is, every target in one pass through each block.

    Args:
        tokens: (W, L) int64 calibration windows.
        watch: target -> its observer, or None to leave it out.
        steps: counts the slabs of each block.
        stage, note: as of `walk`; not where blocks share a matrix, whose sums span them.

    Yields:
        (target, the observer's result) in the order of the model; a matrix that blocks share after its last
        use.

    Raises:
        ValueError: as `walk`.
    """
    watch = _of_inputs(watch)
    shared: list[tuple[Target, Any]] = []  # whose later uses are still to come
    tail = any(watch(target) is not None for target in architecture.tail.targets)
    for stop in walk(architecture, tokens, tail=tail, steps=steps, stage=stage, note=note):
        block = stop.block
        watched = [(target, observer) for target in block.targets if (observer := watch(target)) is not None]
        again = [(target, observer) for target, observer in shared if block.index in target.uses]
        layer = watching_layers(block.targets, {target.name: observer for target, observer in watched})
        stop.run({target.kind: observer for target, observer in (*watched, *again)} | layer)
        of_layer = lent(stop, layer)
        shared += [(target, observer) for target, observer in watched if target.uses]
        for target, observer in (*watched, *again):
            if not target.uses or target.uses[-1] == block.index:
                yield target, with_layer(target, stop.result(observer), of_layer)


def _of_inputs(watch: Watch) -> Watch:
    """What is looked up has none."""
    return lambda target: None if target.looked_up else watch(target)


def together(targets: Sequence[Target], watch: Watch) -> Iterator[list[Target]]:
    """The targets of a block in the order of the data, in parts that one pass can look at.

    Those are what reads the same, and experts, whose Hessians are held together, up to `HELD` bytes of them.

    Args:
        watch: target -> its observer, or None to leave it out.
    """
    parts: dict[str, list[Target]] = {}
    for part in abreast(targets):
        parts.setdefault(part[0].reads or part[0].name, []).extend(part)
    for part in parts.values():
        some, held = [part[0]], _size(part[0], watch)
        for target in part[1:]:
            size = _size(target, watch)
            if held + size > HELD:
                yield some
                some, held = [], 0
            some, held = [*some, target], held + size
        yield some


def _size(target: Target, watch: Watch) -> int:
    """Bytes of the Hessians that an expert's observer will hold; what others keep is next to nothing."""
    observer = watch(target) if target.routed else None
    return 8 * target.matrix.shape[1] ** 2 * (1 + observer.paired) if isinstance(observer, InputGram) else 0
