"""What is in a checkpoint, counted again in its tensors: what `inspect` says.

Place in the flow: after everything, on what lies on the disk. Nothing here changes a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparsessm.architectures import REMOVED_A_LOG, REMOVED_A_LOG_FLOAT16, REMOVED_WEIGHT
from sparsessm.checkpoint import AtRest
from sparsessm.report.contents import HALVES, Table, contents, halves
from sparsessm.report.fed import fed, fed_table
from sparsessm.report.record import kind_of, number, percent, recipe_table, removed_table, targets_table

# Word of a record -> the numbers that it may be stored as.
REMOVED = {word: {value, REMOVED_A_LOG_FLOAT16[word]} for word, value in REMOVED_A_LOG.items()}
REMOVED |= {word: {value} for word, value in REMOVED_WEIGHT.items()}


def inspection(found: AtRest, directory: str, record: dict[str, Any] | None) -> dict[str, Any]:
    """What is in a checkpoint; plain values. One tensor is read at a time.

    Args:
        directory: where it came from. record: its own, if it is a result; see `record.checked`.

    Returns:
        "model", "format"; "tensors": bytes here, dtypes (of a grid: of the stock checkpoint) and stored bits
        a weight, by kind; "removed": see `recount`; "record".

    Raises:
        ValueError: as `recount`; a file was changed.
    """
    checkpoint = found.checkpoint
    state = checkpoint.model.state_dict(keep_vars=True)
    places = {id(state[name]): name for name in found.tensors}

    def value(name: str) -> Tensor:
        return found.exact(places[id(state[name])])  # a tied one lies under its other name

    counts = recount(record, state, value, f"{directory}/pruning.json") if record else {}
    here: Counter[str] = Counter()
    entries: Counter[str] = Counter()
    for name, size in found.sizes.items():
        here[kind_of(name)] += size
        entries[kind_of(name)] += state[name].numel()
    dtypes = {kind: forms for kind, (_, forms) in contents(state, checkpoint.stored).items()}
    sizes = {
        kind: {
            "bytes": size,
            "dtypes": sorted(str(form).removeprefix("torch.") for form in dtypes[kind]),
            "bits": 8 * size / entries[kind],
        }
        for kind, size in here.most_common()
    }
    facts = {"model": directory, "format": checkpoint.format, "tensors": sizes}
    return {**facts, "removed": counts, "record": record}


def inspection_tables(facts: Mapping[str, Any]) -> list[Table]:
    """What `inspection` returned, for people."""
    total = sum(kind["bytes"] for kind in facts["tensors"].values())
    title = f"{facts['model']}: format {facts['format']}, {total:,} bytes of tensors"
    cells = [
        [
            name,
            ", ".join(kind["dtypes"]),
            f"{kind['bytes']:,}",
            percent(kind["bytes"] / total),
            number(kind["bits"], ".3g"),
        ]
        for name, kind in facts["tensors"].items()
    ]
    for name, half in halves(facts["tensors"]).items():
        size = half["bytes"]
        cells.append([HALVES[name], "", f"{size:,}", percent(size / total), number(half["bits"], ".3g")])
    found: list[Table] = [(title, ["tensors", "dtype", "bytes", "share", "bits a weight"], cells, 2)]
    if record := facts["record"]:
        parts = record["targets"], record["totals"]
        found += [
            ("What was removed (counted again in the tensors)", *targets_table(*parts), 2),
            ("The same by kind", *removed_table(*parts), 2),
            *([fed_table(experts)] if (experts := fed(record["targets"])) else []),
            ("Recipe", *recipe_table(record["recipe"]), 2),
        ]
    return found


def recount(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], value: Callable[[str], Tensor], path: str
) -> dict[str, int]:
    """Target -> entries of the tensor that have the removed value, which a record must not exceed.

    There may be more: of an earlier pruning, and `unit` stores 0, as do models near their start.

    Args:
        tensors: by name; only their shapes are read.
        value: the tensor of a name; asked for once each, and dropped before the next.
        path: of the record.

    Raises:
        ValueError: a target that the model has not, or that has fewer; named.
    """
    rows = [row for row in record["targets"] if row["removed"] != "cut"]  # that is not there to be counted
    inside: dict[str, list[tuple[int, int | None]]] = {}  # tensor -> (number of a row, its slice of it)
    counts: dict[int, int] = {}
    for place, row in enumerate(rows):
        name = row["target"]
        held, _, expert = name.rpartition(".")
        if row["removed"] == "projected":
            counts[place] = _projected(tensors, name.removesuffix(".state"))
        elif expert.isdigit() and held in tensors and int(expert) < len(tensors[held]):
            inside.setdefault(held, []).append((place, int(expert)))
        elif name in tensors:
            inside.setdefault(name, []).append((place, None))
    for held, parts in inside.items():
        whole = value(held)
        for place, expert in parts:
            counts[place] = _count(whole if expert is None else whole[expert], rows[place]["removed"])
        del whole  # before the next one is read
    for place, row in enumerate(rows):
        if place not in counts:
            raise ValueError(f"{path}: the model has no {row['target']}")
        _refuse_fewer(counts[place], row, path)
    return {row["target"]: counts[place] for place, row in enumerate(rows)}


def _count(tensor: Tensor, removed: str) -> int:
    """Entries that have the values of a record's word."""
    return sum(int((tensor == value).sum()) for value in REMOVED[removed])


def _projected(tensors: Mapping[str, Tensor], layer: str) -> int:
    """States, of all groups, that have no direction in a layer."""
    projection = tensors.get(f"{layer}.mixer.B_projection")
    return 0 if projection is None else projection.shape[0] * (projection.shape[2] - projection.shape[1])


def _refuse_fewer(found: int, row: Mapping[str, Any], path: str) -> None:
    if found < row["pruned"]:
        count = f"{row['pruned']} removed entries, but the tensor has {found}"
        raise ValueError(f"{path} does not fit the tensors: it says that {row['target']} has {count}")
