"""What a plan would do, before it is done: `prune --dry-run`.

Place in the flow: beside the loops. Nothing here looks at data or changes a weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, dtype

from sparsessm.architectures import Architecture, Target
from sparsessm.methods import Rule
from sparsessm.methods.grids import Uniform
from sparsessm.methods.patterns import NofM
from sparsessm.pruning.mixes import saved
from sparsessm.recipe.rules import Assignment, words
from sparsessm.recipe.sizes import Order, size_of
from sparsessm.report.contents import HALVES, VOCABULARY, Table, halves
from sparsessm.report.record import kind_of, number, percent


def entries(
    assignment: Assignment, tensors: Mapping[str, Tensor], stored: Mapping[str, dtype]
) -> dict[str, Any]:
    """What the rules will hit, and bytes before and after; plain values.

    Shares are those that were asked for: with an allocation other than `uniform` only their mean is known
    before a look at the data. Where bits are asked for the sparsity is None: it comes out.

    Args:
        tensors: parameters by name, any shape; only their number of elements is read.
        stored: the dtype of each name in the checkpoint.

    Returns:
        "rules": one entry for each rule and family it hits. "bytes": "now"; "after", the same, as zeros are
        stored; "packed", with the pruned linear matrices as a bitmask, 1 bit a weight, and the kept values in
        their dtype (a matrix that this makes larger stays as it is), or with the bits that are asked for;
        "halves", the same as `contents.halves` says it; "even": both share the bits that were asked for, here
        evenly, in the run as one step for all of them says; "dense", what then still is dense, by kind of
        tensor, the largest first.
    """
    rules, packed = [], {}
    for group in assignment.groups:
        for family in dict.fromkeys(target.family for target in group.targets):
            part = [target for target in group.targets if target.family == family]
            rule = assignment.rules[part[0].name]
            rules.append(
                {
                    "rule": group.title,
                    "family": family,
                    "targets": dict(Counter(target.kind for target in part)),
                    "entries": sum(target.matrix.numel() for target in part),
                    "sparsity": rule.sparsity or None if rule.bits else rule.sparsity,
                    **words(rule),
                }
            )
            for target in part if family != "ssm" else ():
                total = target.matrix.numel()
                size = packed_size(rule, target)
                # the slices of an expert tensor add up to it
                name = target.name.rpartition(".")[0] if target.routed else target.name
                packed[name] = packed.get(name, 0) + min(size, total * target.stored.itemsize)
    sizes = {name: tensors[name].numel() * form.itemsize for name, form in stored.items()}
    dense: Counter[str] = Counter()
    for name, size in sizes.items():
        if name not in packed:
            dense[kind_of(name) + (".bias" if name.endswith(".bias") else "")] += size
    now = sum(sizes.values())
    shared = [part for part in assignment.budgets if any(assignment.rules[t.name].bits for t in part)]
    here: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for name, size in {**sizes, **packed}.items():
        here[kind_of(name)] += size
        weights[kind_of(name)] += tensors[name].numel()
    kinds = {kind: {"bytes": size, "bits": 8 * size / weights[kind]} for kind, size in here.items()}
    return {
        "rules": rules,
        "bytes": {
            "now": now,
            "after": now,
            "packed": sum(here.values()),
            "halves": halves(kinds),
            "even": any(len({kind_of(t.name) in VOCABULARY for t in part}) == 2 for part in shared),
            "dense": dict(dense.most_common()),
        },
    }


def working(architecture: Architecture, rules: Mapping[str, Rule]) -> int:
    """Bytes that a working directory takes beside hidden states, about: the blocks when all are changed, and
    what is `coded`.

    A changed block is there in the narrowest dtypes that hold its values: those of the checkpoint, and
    float32 of a matrix on a grid. Embedding and head are there if a rule hits them.
    """
    named = architecture.model.named_parameters(remove_duplicate=False)
    stored = {id(p): form for name, p in named if (form := architecture.stored.get(name))}
    hit = [target for target in architecture.targets if target.name in rules]
    tail = [architecture.tail] if any(target.layer == architecture.tail.index for target in hit) else []
    tensors = [p for block in (*architecture.blocks, *tail) for p in block.layer.parameters()]
    size = sum(p.numel() * stored.get(id(p), p.dtype).itemsize for p in tensors)
    wider = [t.matrix.numel() * (4 - t.stored.itemsize) for t in hit if rules[t.name].rounds]
    return size + sum(wider) + coded(architecture, rules)


def coded(architecture: Architecture, rules: Mapping[str, Rule]) -> int:
    """Bytes of the matrices on a grid as a run keeps them until they are written, about."""
    found = ((target, rules.get(target.name)) for target in architecture.targets)
    return sum(packed_size(rule, target) for target, rule in found if rule is not None and rule.rounds)


def packed_size(rule: Rule, target: Target) -> int:
    """Bytes of a matrix in a packed file: on its grid, or as a bitmap and what it keeps."""
    total, stays = target.matrix.numel(), kept(rule, *target.matrix.shape)
    if rule.bits is not None:
        return math.ceil(rule.bits * total / 8)
    if isinstance(rule.grid, Uniform):
        masked = stays if rule.sparsity > 0 else None
        rows, columns = target.matrix.shape
        return -(-rule.grid.stored(rows, columns, masked) // 8)
    return -(-total // 8) + stays * target.stored.itemsize


def kept(rule: Rule, rows: int, columns: int) -> int:
    """Entries of a matrix that stay, up to the rounding of a sweep by columns."""
    if isinstance(rule.pattern, NofM):
        return rows * columns // rule.pattern.m * rule.pattern.n
    if rule.method.by_row:
        return rows * (columns - round(rule.sparsity * columns))
    return rows * columns - round(rule.sparsity * rows * columns)


def units(order: Order, architecture: Architecture) -> dict[str, Any]:
    """What an order for whole units will leave; plain values."""
    axes = {
        axis: {"now": size_of(architecture, axis), "after": size, "method": order.methods[axis].name}
        for axis, size in order.sizes.items()
    }
    total = sum(parameter.numel() for parameter in architecture.model.parameters())
    # what projections add depends on how many directions each layer gets
    projects = any(method.projects for method in order.methods.values())
    gone = saved(architecture, order.sizes) if order.sizes and not projects else None
    counts = {"now": total, "after": None if gone is None else total - gone}
    return {
        "axes": axes,
        "share": order.share,
        "by_layer": order.by_layer,
        "methods": order.names,
        "repair": order.repair,
        "parameters": counts,
    }


def units_table(model: str, record: Mapping[str, Any]) -> Table:
    """What `units` returned, for people."""
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


def entries_tables(model: str, record: Mapping[str, Any]) -> list[Table]:
    """What `entries` returned, for people."""
    fields = ["method", "pattern", "sparsity", "repair", "price", "allocation"]
    if any(rule["grid"] != "none" for rule in record["rules"]):
        fields.append("grid")
    rules = []
    for rule in record["rules"]:
        targets = ", ".join(f"{count} {kind}" for kind, count in rule["targets"].items())
        share = "found" if rule["sparsity"] is None else f"{rule['sparsity']:.4g}"
        cells = [share if name == "sparsity" else rule[name] for name in fields]
        rules.append([rule["rule"], f"{rule['family']}: {targets}", *cells, f"{rule['entries']:,}"])
    sizes = record["bytes"]
    titles = {"now": "checkpoint now", "after": "after pruning, zeros stored", "packed": "packed"}
    lines = [
        [title, f"{sizes[name]:,}", percent(sizes[name] / sizes["now"]), ""] for name, title in titles.items()
    ]
    for name, half in sizes["halves"].items():
        share, bits = percent(half["bytes"] / sizes["now"]), number(half["bits"], ".3g")
        title = HALVES[name] + ", if bits were shared evenly" * sizes["even"]
        lines.append([f"  {title}", f"{half['bytes']:,}", share, bits])
    lines += [
        [f"  of it dense: {kind}", f"{size:,}", percent(size / sizes["now"]), ""]
        for kind, size in sizes["dense"].items()
    ]
    return [
        (f"{model}: what would be pruned", ["rule", "targets", *fields, "entries"], rules, 2 + len(fields)),
        ("Bytes of tensors", ["", "bytes", "of now", "bits a weight"], lines, 1),
    ]
