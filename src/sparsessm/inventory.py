"""What is in a checkpoint, in bytes and counts: before pruning (`prune --dry-run`) and after (`inspect`).

Place in the flow: beside it. Nothing here looks at data or changes a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, dtype

from sparsessm.architectures import adapt
from sparsessm.architectures.base import REMOVED_A_LOG, REMOVED_A_LOG_FLOAT16, REMOVED_WEIGHT
from sparsessm.methods import Rule
from sparsessm.mixture import saved
from sparsessm.patterns import NofM
from sparsessm.plan import Plan, words
from sparsessm.report import kind_of, percent, recipe_table, removed_table, targets_table
from sparsessm.units import Order, size_of

if TYPE_CHECKING:
    from sparsessm.architectures import Architecture
    from sparsessm.checkpoint import Checkpoint

# Word of a record -> the numbers that it may be stored as.
REMOVED = {word: {value, REMOVED_A_LOG_FLOAT16[word]} for word, value in REMOVED_A_LOG.items()}
REMOVED |= {word: {value} for word, value in REMOVED_WEIGHT.items()}
Table = tuple[str, list[str], list[list[str]], int]  # title, columns, cells, columns that are words


def preview(plan: Plan, tensors: Mapping[str, Tensor], stored: Mapping[str, dtype]) -> dict[str, Any]:
    """What a plan will hit, and bytes before and after; plain values.

    Shares are those that were asked for: with an allocation other than `uniform` only their mean is known
    before a look at the data.

    Args:
        tensors: parameters by name, any shape; only their number of elements is read.
        stored: the dtype of each name in the checkpoint.

    Returns:
        "rules": one entry for each rule and family it hits. "bytes": "now"; "after", the same, as zeros are
        stored; "packed", with the pruned linear matrices as a bitmask, 1 bit a weight, and the kept values in
        their dtype (a matrix that this makes larger stays as it is); "dense", what then still is dense, by
        kind of tensor, the largest first.
    """
    rules, packed = [], {}
    for group in plan.groups:
        for family in dict.fromkeys(target.family for target in group.targets):
            part = [target for target in group.targets if target.family == family]
            rule = plan.rules[part[0].name]
            rules.append(
                {
                    "rule": group.title,
                    "family": family,
                    "targets": dict(Counter(target.kind for target in part)),
                    "entries": sum(target.matrix.numel() for target in part),
                    "sparsity": rule.sparsity,
                    **words(rule),
                }
            )
            for target in part if family != "ssm" else ():
                total = target.matrix.numel()
                size = -(-total // 8) + kept(rule, *target.matrix.shape) * target.stored.itemsize
                # the slices of an expert tensor add up to it
                name = target.name.rpartition(".")[0] if target.routed else target.name
                packed[name] = packed.get(name, 0) + min(size, total * target.stored.itemsize)
    sizes = {name: tensors[name].numel() * form.itemsize for name, form in stored.items()}
    dense: Counter[str] = Counter()
    for name, size in sizes.items():
        if name not in packed:
            dense[kind_of(name) + (".bias" if name.endswith(".bias") else "")] += size
    now = sum(sizes.values())
    return {
        "rules": rules,
        "bytes": {
            "now": now,
            "after": now,
            "packed": sum(dense.values()) + sum(packed.values()),
            "dense": dict(dense.most_common()),
        },
    }


def kept(rule: Rule, rows: int, columns: int) -> int:
    """Entries of a matrix that stay, up to the rounding of a sweep by columns."""
    if isinstance(rule.pattern, NofM):
        return rows * columns // rule.pattern.m * rule.pattern.n
    if rule.method.by_row:
        return rows * (columns - round(rule.sparsity * columns))
    return rows * columns - round(rule.sparsity * rows * columns)


def preview_units(order: Order, architecture: Architecture) -> dict[str, Any]:
    """What an order for whole units will leave; plain values."""
    axes = {
        axis: {"now": size_of(architecture, axis), "after": size, "method": order.selections[axis].name}
        for axis, size in order.sizes.items()
    }
    total = sum(parameter.numel() for parameter in architecture.model.parameters())
    # what projections add depends on how many directions each layer gets
    projects = any(selection.projects for selection in order.selections.values())
    gone = saved(architecture, order.sizes) if order.sizes and not projects else None
    counts = {"now": total, "after": None if gone is None else total - gone}
    repair = f"dense-target:{order.strength:g}" if order.strength else "none"
    return {
        "axes": axes,
        "share": order.share,
        "by_layer": order.by_layer,
        "methods": order.methods,
        "repair": repair,
        "parameters": counts,
    }


def share_left(plan: Plan | Order, checkpoint: Checkpoint) -> float:
    """About the share of the parameters that the result will have, at most: zeros are stored."""
    if isinstance(plan, Plan):
        return 1.0
    if plan.share is not None:
        return 1.0 - plan.share
    counts = preview_units(plan, adapt(checkpoint.model, checkpoint.stored))["parameters"]
    return 1.0 if counts["after"] is None else counts["after"] / counts["now"]


def preview_units_table(model: str, record: Mapping[str, Any]) -> Table:
    """What `preview_units` returned, for people."""
    cells = [
        [
            axis,
            row["method"] + (", by layer" if record["by_layer"] else ""),
            str(row["now"]),
            str(row["after"]),
            percent(1 - row["after"] / row["now"]),
        ]
        for axis, row in record["axes"].items()
    ] or [
        [
            "found by measuring",
            ", ".join(record["methods"]),
            "",
            "",
            percent(record["share"]) + " of all parameters",
        ]
    ]
    if (after := record["parameters"]["after"]) is not None:
        now = record["parameters"]["now"]
        cells.append(["parameters", "", f"{now:,}", f"{after:,}", percent(1 - after / now)])
    return f"{model}: what would be taken out", ["axis", "by", "units now", "after", "removed"], cells, 2


def preview_tables(model: str, record: Mapping[str, Any]) -> list[Table]:
    """What `preview` returned, for people."""
    fields = ["method", "pattern", "sparsity", "repair", "weight", "allocation"]
    rules = []
    for rule in record["rules"]:
        targets = ", ".join(f"{count} {kind}" for kind, count in rule["targets"].items())
        cells = [f"{rule['sparsity']:.4g}" if name == "sparsity" else rule[name] for name in fields]
        rules.append([rule["rule"], f"{rule['family']}: {targets}", *cells, f"{rule['entries']:,}"])
    sizes = record["bytes"]
    titles = {"now": "checkpoint now", "after": "after pruning, zeros stored", "packed": "packed"}
    lines = [
        [title, f"{sizes[name]:,}", percent(sizes[name] / sizes["now"])] for name, title in titles.items()
    ]
    lines += [
        [f"  of it dense: {kind}", f"{size:,}", percent(size / sizes["now"])]
        for kind, size in sizes["dense"].items()
    ]
    return [
        (f"{model}: what would be pruned", ["rule", "targets", *fields, "entries"], rules, 8),
        ("Bytes of tensors", ["", "bytes", "of now"], lines, 1),
    ]


def contents(tensors: Mapping[str, Tensor], stored: Mapping[str, dtype]) -> dict[str, tuple[int, set[dtype]]]:
    """Kind of tensor -> the bytes it takes in the checkpoint and its dtypes there, the largest first.

    Args:
        tensors: parameters by name, any shape; only their number of elements is read.
        stored: the dtype of each name in the checkpoint; what it lacks (tied tensors) takes no bytes.
    """
    kinds: dict[str, tuple[int, set[dtype]]] = {}
    for name in stored:
        size, dtypes = kinds.get(kind_of(name), (0, set()))
        size += tensors[name].numel() * stored[name].itemsize
        kinds[kind_of(name)] = size, dtypes | {stored[name]}
    return dict(sorted(kinds.items(), key=lambda item: -item[1][0]))


def inspection(checkpoint: Checkpoint, directory: str, record: dict[str, Any] | None) -> dict[str, Any]:
    """What is in a checkpoint; plain values.

    Args:
        directory: where it came from. record: its own, if it is a result; see `report.checked`.

    Returns:
        "model", "format"; "tensors": bytes and dtypes by kind; "removed": see `recount`; "record".

    Raises:
        ValueError: as `recount`.
    """
    state = checkpoint.model.state_dict()
    found = recount(record, state, f"{directory}/pruning.json") if record else {}
    sizes = {
        kind: {"bytes": size, "dtypes": sorted(str(form).removeprefix("torch.") for form in forms)}
        for kind, (size, forms) in contents(state, checkpoint.stored).items()
    }
    facts = {"model": directory, "format": checkpoint.format, "tensors": sizes}
    return {**facts, "removed": found, "record": record}


def inspection_tables(facts: Mapping[str, Any]) -> list[Table]:
    """What `inspection` returned, for people."""
    total = sum(kind["bytes"] for kind in facts["tensors"].values())
    title = f"{facts['model']}: format {facts['format']}, {total:,} bytes of tensors"
    cells = [
        [name, ", ".join(kind["dtypes"]), f"{kind['bytes']:,}", percent(kind["bytes"] / total)]
        for name, kind in facts["tensors"].items()
    ]
    found: list[Table] = [(title, ["tensors", "dtype", "bytes", "share"], cells, 2)]
    if record := facts["record"]:
        parts = record["targets"], record["totals"]
        found += [
            ("What was removed (counted again in the tensors)", *targets_table(*parts), 2),
            ("The same by kind", *removed_table(*parts), 2),
            ("Recipe", *recipe_table(record["recipe"]), 2),
        ]
    return found


def recount(record: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> dict[str, int]:
    """Target -> entries of the tensor that have the removed value, which a record must not exceed.

    There may be more: of an earlier pruning, and `unit` stores 0, as do models near their start.

    Args:
        path: of the record.

    Raises:
        ValueError: a target that the model has not, or that has fewer; named.
    """
    found = {}
    for row in record["targets"]:
        name = row["target"]
        if row["removed"] == "cut":  # what is gone is not there to be counted
            continue
        if row["removed"] == "projected":
            found[name] = _projected(tensors, name.removesuffix(".state"))
            _refuse_fewer(found[name], row, path)
            continue
        held, _, expert = name.rpartition(".")
        slices = tensors[held] if expert.isdigit() and held in tensors else ()
        tensor = slices[int(expert)] if expert.isdigit() and int(expert) < len(slices) else tensors.get(name)
        if tensor is None:
            raise ValueError(f"{path}: the model has no {name}")
        found[name] = sum(int((tensor == value).sum()) for value in REMOVED[row["removed"]])
        _refuse_fewer(found[name], row, path)
    return found


def _projected(tensors: Mapping[str, Tensor], layer: str) -> int:
    """States, of all groups, that have no direction in a layer."""
    projection = tensors.get(f"{layer}.mixer.B_projection")
    return 0 if projection is None else projection.shape[0] * (projection.shape[2] - projection.shape[1])


def _refuse_fewer(found: int, row: Mapping[str, Any], path: str) -> None:
    if found < row["pruned"]:
        count = f"{row['pruned']} removed entries, its tensor has {found}"
        raise ValueError(f"{path} does not fit the tensors: it says that {row['target']} has {count}")
